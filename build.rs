//! Compiles the C++ shim (`src/libtorch/*.cpp`) against the libtorch that torch-sys found, and links both.
//!
//! torch-sys exports where the libraries are (`DEP_TCH_LIBTORCH_LIB`) but neither an include path nor its link
//! arguments, so both are derived here. A libtorch that is missing or of another version ends in one sentence.

use std::path::{Path, PathBuf};
use std::process::{Command, exit};
use std::{env, fs};

/// The libtorch version that the pinned tch is made for.
const LIBTORCH_VERSION: &str = "2.11.0";

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    for source in ["shim.cpp", "cuda_graph.cpp", "kernels.cpp", "kernels.cu", "rows.cu", "guarded.h"] {
        println!("cargo:rerun-if-changed=src/libtorch/{source}");
    }
    println!("cargo:rerun-if-env-changed=CUDA_HOME");
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    println!("cargo:rerun-if-env-changed=LIBTORCH_BYPASS_VERSION_CHECK");
    println!("cargo:rerun-if-env-changed=CHILD_TUNING_BUNDLE");
    record_commit();

    let library_folder = match env::var("DEP_TCH_LIBTORCH_LIB") {
        Ok(folder) => PathBuf::from(folder),
        Err(_) => {
            stop("torch-sys did not say where libtorch is; run `make setup` and build with `make build`")
        }
    };
    let include = library_folder.join("../include");
    check_version(&include);

    let mut shim = cc::Build::new();
    shim.cpp(true)
        .pic(true)
        .std("c++17")
        .warnings(false)
        .include(&include)
        .include(include.join("torch/csrc/api/include"))
        .define("_GLIBCXX_USE_CXX11_ABI", "1")
        .file("src/libtorch/shim.cpp")
        .file("src/libtorch/cuda_graph.cpp")
        .file("src/libtorch/kernels.cpp")
        // An element of a kernel's is the same on the CPU and on a GPU, to the bit.
        .flag("-ffp-contract=off");
    let has_cuda = library_folder.join("libtorch_cuda.so").exists();
    let cuda_headers = cuda_headers(&library_folder).filter(|_| has_cuda);
    if let Some(folder) = &cuda_headers {
        shim.include(folder).define("CHILD_TUNING_CUDA", None);
    }
    shim.compile("child_tuning_shim");

    let folder = library_folder.display();
    println!("cargo:rustc-link-search=native={folder}");
    // What `make bundle` ships finds the libtorch of the machine that it runs on by its launcher.
    if env::var_os("CHILD_TUNING_BUNDLE").is_none() {
        println!("cargo:rustc-link-arg=-Wl,-rpath,{folder}");
    }
    if cuda_headers.is_some() {
        println!("cargo:rustc-link-arg=-lc10_cuda");
    }
    if has_cuda {
        // Nothing names a symbol of libtorch_cuda, yet loading it is what registers the CUDA kernels.
        for argument in ["-Wl,--no-as-needed", "-ltorch_cuda", "-Wl,--as-needed"] {
            println!("cargo:rustc-link-arg={argument}");
        }
    }
    // For `libtorch::release_freed_memory`, which finds it in the program by name.
    println!("cargo:rustc-link-arg-bins=-Wl,--export-dynamic-symbol=mi_collect");
    println!("cargo:rustc-link-lib=torch_cpu");
    println!("cargo:rustc-link-lib=c10");
}

/// Finds the headers of the CUDA runtime, first those that the wheels of PyTorch bring along; CUDA graphs need them. Without them the
/// program builds, and says so where a graph is asked for.
fn cuda_headers(library_folder: &Path) -> Option<PathBuf> {
    let site_packages = library_folder.canonicalize().ok()?.join("../../nvidia/cu13/include");
    let home = env::var_os("CUDA_HOME").map(|home| PathBuf::from(home).join("include"));
    let others = home.into_iter().chain([PathBuf::from("/usr/local/cuda/include")]);
    std::iter::once(site_packages).chain(others).find(|folder| {
        ["cuda_runtime.h", "crt/host_config.h"].iter().all(|header| folder.join(header).exists())
    })
}

/// Stops the build when the headers are missing or belong to another libtorch.
fn check_version(include: &Path) {
    let header = include.join("torch/headeronly/version.h");
    println!("cargo:rerun-if-changed={}", header.display());
    let Ok(text) = fs::read_to_string(&header) else {
        stop(&format!(
            "no libtorch {LIBTORCH_VERSION} headers at {}; run `make setup`, or set LIBTORCH to the folder of a \
             libtorch {LIBTORCH_VERSION} that has include/ and lib/",
            include.display()
        ))
    };
    let part = |name: &str| {
        let start = format!("#define TORCH_VERSION_{name} ");
        text.lines().find_map(|line| line.strip_prefix(&start)).unwrap_or("?").trim()
    };
    let found = ["MAJOR", "MINOR", "PATCH"].map(part).join(".");
    if found != LIBTORCH_VERSION && env::var_os("LIBTORCH_BYPASS_VERSION_CHECK").is_none() {
        stop(&format!(
            "libtorch {found} found at {}, but this program needs {LIBTORCH_VERSION}: unset LIBTORCH and run `make setup`, \
             or point LIBTORCH at a libtorch {LIBTORCH_VERSION}",
            include.display()
        ));
    }
}

/// Hands the commit of the checkout to the program, for the provenance columns of the results.
fn record_commit() {
    let git = |arguments: &[&str]| {
        let output = Command::new("git").args(arguments).output().ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let commit = git(&["rev-parse", "--short=12", "HEAD"]).filter(|commit| !commit.is_empty());
    if let Some(head) = git(&["rev-parse", "--git-path", "logs/HEAD"]) {
        println!("cargo:rerun-if-changed={head}");
    }
    println!("cargo:rustc-env=CHILD_TUNING_COMMIT={}", commit.as_deref().unwrap_or("unknown"));
}

fn stop(message: &str) -> ! {
    println!("cargo::error={message}");
    exit(1);
}
