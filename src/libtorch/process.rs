//! What a program that computes with libtorch settles for its whole process, before anything else.

use std::ffi::{CStr, c_int, c_void};
use std::os::unix::process::CommandExt;

use tch::Device;

/// What libtorch reads from the environment, and what this program sets it to where the user says nothing.
const SETTINGS: [(&str, &str); 9] = [
    // Idle threads sleep instead of spin. Where another process wants the cores, spinning at every barrier made a run
    // that takes two minutes take more than ten.
    (WAIT_POLICY, "passive"),
    // But not at once: waking takes long, and after most barriers there is work again before so many looks.
    ("GOMP_SPINCOUNT", "3000"),
    // Every batch has its own number of tokens, and both oneDNN and the layer through which libtorch calls it (ideep) keep
    // what was compiled for the last 1024 shapes: gigabytes.
    ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128"),
    ("LRU_CACHE_CAPACITY", "128"),
    // For the same reason blocks of GPU memory of one size do not fit the next batch; segments that grow leave no
    // holes behind.
    (CUDA_ALLOCATOR, "expandable_segments:True"),
    // Where libtorch would choose cuDNN's attention, it plans anew for each shape, and a layer that is computed again for
    // backward may get another kernel than the first time, with another dropout.
    ("TORCH_CUDNN_SDPA_DEPRIORITIZED", "1"),
    // A step frees and allocates the same megabytes; given back to the system at once, every page would be handed out,
    // cleared and taken back each time. (Milliseconds.)
    ("MIMALLOC_PURGE_DELAY", "1000"),
    // GPUs count as NVIDIA's tools count them, which also give them their names.
    (GPU_ORDER, "PCI_BUS_ID"),
    // The profiler reports on stderr that a machine has no GPU.
    ("KINETO_LOG_LEVEL", "99"),
];
/// Settings that give way to another one of the user's: the older name of the allocator's settings outranks the newer, and the
/// number of looks the policy.
const YIELDING: [(&str, &str); 2] = [(CUDA_ALLOCATOR, "PYTORCH_ALLOC_CONF"), ("GOMP_SPINCOUNT", WAIT_POLICY)];
const WAIT_POLICY: &str = "OMP_WAIT_POLICY";
const GPU_ORDER: &str = "CUDA_DEVICE_ORDER";
/// Holds `LD_LIBRARY_PATH` as it was before the launcher of the bundle put libtorch first.
pub const OUTER_LIBRARY_PATH: &str = "CHILD_TUNING_OUTER_LIBRARY_PATH";
/// Names those of the settings that are this program's and not the user's, for [`own_settings`].
const OWN_SETTINGS: &str = "CHILD_TUNING_SETTINGS";
const CUDA_ALLOCATOR: &str = "PYTORCH_CUDA_ALLOC_CONF";

/// Makes libtorch a considerate process: idle threads sleep, and what it keeps of CPU kernels and GPU memory is bounded.
/// Whatever the user has set stays.
///
/// The libraries read this when they are loaded, before `main`; so the program starts itself again with it.
pub fn with_a_considerate_environment() {
    let is_set = |name: &str| std::env::var_os(name).is_some();
    let yields = |name: &str| YIELDING.iter().any(|&(own, other)| own == name && is_set(other));
    let missing: Vec<_> = SETTINGS.iter().filter(|(name, _)| !is_set(name) && !yields(name)).collect();
    if missing.is_empty() {
        return;
    }
    if let Ok(program) = std::env::current_exe() {
        let mut again = std::process::Command::new(program);
        // Only returns if it fails, and then the program works as well, if slower beside others.
        let names: Vec<&str> = missing.iter().map(|(name, _)| *name).collect();
        again.args(std::env::args_os().skip(1)).env(OWN_SETTINGS, names.join(" "));
        again.envs(missing.into_iter().copied());
        let _ = again.exec();
    }
}

/// Returns the names of the environment variables that this program set itself, so that a program that is compared with it can
/// be started without them. The order of GPUs is not among them: both are to have the same.
pub fn own_settings() -> Vec<String> {
    let names = std::env::var(OWN_SETTINGS).unwrap_or_default();
    let names = names.split_whitespace().filter(|name| *name != GPU_ORDER);
    names.chain([OWN_SETTINGS]).map(str::to_owned).collect()
}

/// Sets up the thread pools of this process for a thread that trains on `device`, which has to be the calling one; without a number
/// of threads, as the libraries choose it. rayon's pool stays as the first call has made it.
///
/// On the CPU that thread is one of rayon's: from another it would hand each loop over and sleep until it is done. On a GPU
/// backward has threads of its own, and a loop of theirs must not wait for one that waits for them.
pub fn use_threads(threads: Option<usize>, device: Device) {
    if let Some(threads) = threads {
        tch::set_num_threads(i32::try_from(threads).unwrap_or(i32::MAX));
    }
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads.unwrap_or(0));
    let pool = if device == Device::Cpu { pool.use_current_thread() } else { pool };
    // Only fails if there is a pool already.
    let _ = pool.build_global();
}

/// Makes MKL's matrix products give the same bits on any number of threads, so that a run's numbers do not depend on how many
/// runs share the cores. A no-op where the user has set `MKL_CBWR`, and with another library of matrix products.
///
/// Its strict mode fixes in which order the terms of a sum are added up. Has to come before the first product. Returns whether
/// MKL has taken it on.
pub fn keep_the_order_of_sums() -> bool {
    const AUTO: c_int = 2;
    const STRICT: c_int = 0x10000;
    /// `MKL_CBWR_SUCCESS`.
    const SUCCESS: c_int = 0;
    if std::env::var_os("MKL_CBWR").is_some() {
        return false;
    }
    let set = symbol(c"mkl_serv_cbwr_set");
    if set.is_null() {
        return false;
    }
    // SAFETY: the function is that of `mkl_service.h`: `int mkl_cbwr_set(int)`.
    unsafe {
        let set: extern "C" fn(c_int) -> c_int = std::mem::transmute(set);
        // Refused after the first product, and on processors without AVX2; sums are as they were then.
        set(AUTO | STRICT) == SUCCESS
    }
}

/// Gives memory that has been freed back to the system now, and not a second later: for a moment at which much was freed and
/// much else is about to be allocated. A no-op in a program with another allocator than this one's (mimalloc).
pub fn release_freed_memory() {
    let collect = symbol(c"mi_collect");
    if !collect.is_null() {
        // SAFETY: the function is mimalloc's `void mi_collect(bool force)`.
        unsafe {
            let collect: extern "C" fn(bool) = std::mem::transmute(collect);
            collect(true);
        }
    }
}

/// Returns the address of a function of the program or its libraries; null if there is none of this name.
fn symbol(name: &CStr) -> *mut c_void {
    // SAFETY: the handle asks the program and all loaded libraries, and the name is a C string.
    unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) }
}

/// Makes a write beyond the limit of a file's size (`ulimit -f`) an error like others, as Python does; the system would end the
/// process without a word.
pub fn survive_file_size_limits() {
    // SAFETY: ignoring a signal runs no code of ours.
    unsafe {
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
    }
}

/// Calls what listens to signals, and goes on ignoring those that the process was started to ignore: the end of a terminal under
/// `nohup`, Ctrl-C in the background of a script.
pub fn keeping_ignored_signals<T>(listen: impl FnOnce() -> T) -> T {
    let is_ignored = |signal: &c_int| {
        // SAFETY: a zeroed `sigaction` is one, and asking for the present one changes nothing.
        unsafe {
            let mut present: libc::sigaction = std::mem::zeroed();
            libc::sigaction(*signal, std::ptr::null(), &mut present) == 0
                && present.sa_sigaction == libc::SIG_IGN
        }
    };
    let ignored: Vec<c_int> = [libc::SIGHUP, libc::SIGINT].into_iter().filter(is_ignored).collect();
    let outcome = listen();
    for signal in ignored {
        // SAFETY: ignoring a signal runs no code of ours.
        unsafe {
            libc::signal(signal, libc::SIG_IGN);
        }
    }
    outcome
}

/// Ends the process at once. The usual end would run the destructors of libtorch beside those of its threads that still compute.
pub fn end_now(code: i32) -> ! {
    // SAFETY: nothing of this process is used afterwards.
    unsafe { libc::_exit(code) }
}
