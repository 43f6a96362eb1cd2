//! The one error type of the library.
//!
//! A message is a lower-case fragment that reads well after `error: `; it names the file, the
//! place in it and, where there is one, the mend.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// Shorthand for a result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong, grouped by who can mend it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The experiment or the command line asks for something impossible or unknown.
    #[error("{0}")]
    Configuration(String),

    /// A data file cannot be used; `line` counts from 1, and 0 means the file as a whole.
    #[error("{}: {message}", place(path, *line))]
    Data {
        /// The file at fault.
        path: PathBuf,
        /// The line at fault, from 1; 0 for the whole file.
        line: usize,
        /// What is wrong and how to mend it.
        message: String,
    },

    /// A model folder cannot be used.
    #[error("{}: {message}", path.display())]
    Model {
        /// The folder or file at fault.
        path: PathBuf,
        /// What is wrong and how to mend it.
        message: String,
    },

    /// The machine lacks something: a device, a library, a writable folder.
    #[error("{0}")]
    Environment(String),

    /// A file operation failed.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried, such as `read` or `create`.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The operating system's answer.
        source: std::io::Error,
    },

    /// libtorch refused an operation.
    #[error("libtorch: {0}")]
    Libtorch(String),

    /// A loss or a gradient stopped being a finite number.
    #[error("{0}")]
    Diverged(String),

    /// The user asked to stop.
    #[error("interrupted")]
    Interrupted,
}

impl Error {
    /// Makes a configuration error.
    pub fn configuration(message: impl Into<String>) -> Self {
        Error::Configuration(message.into())
    }

    /// Makes an error about a data file; `line` counts from 1, 0 means the whole file.
    pub fn data(path: impl AsRef<Path>, line: usize, message: impl Into<String>) -> Self {
        Error::Data { path: path.as_ref().to_path_buf(), line, message: message.into() }
    }

    /// Makes an error about a model folder.
    pub fn model(path: impl AsRef<Path>, message: impl Into<String>) -> Self {
        Error::Model { path: path.as_ref().to_path_buf(), message: message.into() }
    }

    /// Makes an error of a file operation, to be used with `map_err`.
    pub fn io(action: &'static str, path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.as_ref().to_path_buf();
        move |source| Error::Io { action, path, source }
    }

    /// Returns whether libtorch could not get memory, on the CPU or on a GPU: a smaller batch may get through.
    pub fn is_out_of_memory(&self) -> bool {
        // libtorch's CUDA allocator, the CUDA runtime, the driver (segments that grow), cuBLAS for its workspace or as a whole
        // on a full GPU, and the allocator of the CPU.
        const TEXTS: [&str; 7] = [
            "CUDA out of memory",
            "CUDA error: out of memory",
            "CUDA driver error: out of memory",
            "CUBLAS_STATUS_ALLOC_FAILED",
            "CUBLAS_STATUS_NOT_INITIALIZED",
            "OOM trying to allocate workspace for cublaslt",
            "DefaultCPUAllocator: can't allocate memory",
        ];
        matches!(self, Error::Libtorch(message) if TEXTS.iter().any(|text| message.contains(text)))
    }

    /// The exit code of the command line for this error: 2 configuration, 3 environment, 1 a failed run, 130 an interruption.
    pub fn exit_code(&self) -> u8 {
        match self {
            Error::Configuration(_) | Error::Data { .. } | Error::Model { .. } => 2,
            // Somebody typed the name of a file that is not there.
            Error::Io { action: "read", source, .. } if source.kind() == ErrorKind::NotFound => 2,
            Error::Environment(_) | Error::Io { .. } => 3,
            Error::Libtorch(_) | Error::Diverged(_) => 1,
            Error::Interrupted => 130,
        }
    }
}

fn place(path: &Path, line: usize) -> String {
    match line {
        0 => path.display().to_string(),
        line => format!("{}:{line}", path.display()),
    }
}
