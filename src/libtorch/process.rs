//! What a program that computes with libtorch settles for its whole process, before anything else.

use std::ffi::c_int;
use std::os::unix::process::CommandExt;

/// Makes libtorch's idle threads sleep instead of spin and bounds what its kernels keep, unless the user has set a policy.
///
/// Both are read from the environment when the libraries are loaded, before `main`; so the program starts itself again
/// with them. Where another process wants the cores, spinning at every barrier made a run that takes two minutes take
/// more than ten.
pub fn with_a_considerate_environment() {
    const POLICY: &str = "OMP_WAIT_POLICY";
    if std::env::var_os(POLICY).is_some() {
        return;
    }
    // Every batch has its own number of tokens, and oneDNN keeps what it compiled for the last 1024 shapes: gigabytes.
    const SHAPES_KEPT: (&str, &str) = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128");
    if let Ok(program) = std::env::current_exe() {
        let mut again = std::process::Command::new(program);
        // Only returns if it fails, and then the program works as well, if slower beside others.
        again.args(std::env::args_os().skip(1)).env(POLICY, "passive");
        if std::env::var_os(SHAPES_KEPT.0).is_none() {
            again.env(SHAPES_KEPT.0, SHAPES_KEPT.1);
        }
        let _ = again.exec();
    }
}

/// Makes the C allocator keep freed memory for the next tensor instead of giving it back to the system.
///
/// A training step frees and allocates the same megabytes again and again; without this, Linux hands out, clears and
/// takes back every page each time, a tenth of a step on the CPU. For the whole process; a no-op but on glibc.
pub fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        const M_TRIM_THRESHOLD: c_int = -1;
        const M_MMAP_THRESHOLD: c_int = -3;
        /// The largest that glibc takes.
        const MMAP_THRESHOLD_MAX: c_int = 32 << 20;
        unsafe extern "C" {
            fn mallopt(parameter: c_int, value: c_int) -> c_int;
        }
        // SAFETY: mallopt changes two numbers of the allocator under its own lock; a refusal changes nothing.
        unsafe {
            mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD_MAX);
            mallopt(M_TRIM_THRESHOLD, c_int::MAX);
        }
    }
}
