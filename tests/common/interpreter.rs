//! The Python in which transformers answers for comparisons.

use std::path::Path;
use std::process::Command;

/// Returns the Python that `make test` sets up, if it has the modules that are named, parted by commas. Where it lacks one the test is
/// skipped, which is printed, or fails if `CHILD_TUNING_REQUIRE_PYTHON` is set, as `make test` has it.
pub fn python_with(modules: &str) -> Option<Command> {
    let python = Path::new(env!("CARGO_MANIFEST_DIR")).join(".venv/bin/python");
    let found = Command::new(&python).args(["-c", &format!("import {modules}")]).output();
    if found.is_ok_and(|output| output.status.success()) {
        return Some(Command::new(python));
    }
    let lack = format!("{} lacks one of {modules}; `make test` installs them", python.display());
    assert!(std::env::var_os("CHILD_TUNING_REQUIRE_PYTHON").is_none(), "{lack}");
    println!("skipped: {lack}");
    None
}
