//! The launcher of the bundle: which libtorch it finds, and what it says where there is none that fits.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use tempfile::TempDir;

use crate::support::project;

/// An unpacked bundle whose program tells its libraries and arguments, and a python3 that knows one folder of packages.
struct Bundle {
    folder: TempDir,
}

impl Bundle {
    fn new() -> Self {
        let bundle = Self { folder: tempfile::tempdir().unwrap() };
        bundle.script("child-tuning", &fs::read_to_string(project("scripts/launcher.sh")).unwrap());
        bundle.script(
            "bin/child-tuning",
            "#!/bin/sh\necho \"$LD_LIBRARY_PATH\"\nprintf '%s\\n' \"$@\"\nexit 7\n",
        );
        // The real interpreter, without the packages that it has itself.
        bundle.script(
            "tools/python3",
            &format!("#!/bin/sh\nPYTHONPATH=$PACKAGES exec {} -S \"$@\"\n", python().display()),
        );
        bundle
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write(&self, name: &str, content: &str) {
        fs::create_dir_all(self.path(name).parent().unwrap()).unwrap();
        fs::write(self.path(name), content).unwrap();
    }

    fn script(&self, name: &str, content: &str) {
        self.write(name, content);
        fs::set_permissions(self.path(name), fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// Installs a PyTorch that must not be imported.
    fn torch(&self, packages: &str, version: &str) {
        self.write(&format!("{packages}/torch/__init__.py"), "raise SystemExit('imported')");
        self.write(&format!("{packages}/torch/version.py"), &format!("__version__ = '{version}'\n"));
        self.write(&format!("{packages}/torch/lib/libtorch_cuda.so"), "");
    }

    /// Starts the launcher; `packages` are folders that python3 installs to.
    fn start(&self, packages: &[&str], libtorch: Option<&str>) -> Output {
        let mut command = Command::new(self.path("child-tuning"));
        let paths = std::env::var("PATH").unwrap();
        command.args(["doctor", "--data", "two words"]).current_dir(self.folder.path());
        command.env("PATH", format!("{}:{paths}", self.path("tools").display()));
        let packages: Vec<String> =
            packages.iter().map(|folder| self.path(folder).display().to_string()).collect();
        command.env("PACKAGES", packages.join(":")).env_remove("LD_LIBRARY_PATH").env_remove("LIBTORCH");
        if let Some(libtorch) = libtorch {
            command.env("LIBTORCH", self.path(libtorch));
        }
        command.output().unwrap()
    }

    /// Asserts that the program was started with these library folders and its exit code was handed on.
    fn starts(&self, packages: &[&str], libtorch: Option<&str>, folders: &[&str]) {
        let output = self.start(packages, libtorch);
        let folders: Vec<String> =
            folders.iter().map(|folder| self.path(folder).display().to_string()).collect();
        let expected = format!("{}\ndoctor\n--data\ntwo words\n", folders.join(":"));
        assert_eq!(String::from_utf8(output.stdout).unwrap(), expected);
        assert_eq!((output.status.code(), output.stderr.len()), (Some(7), 0));
    }

    /// Asserts that the launcher refused with one sentence that names all parts.
    fn refuses(&self, packages: &[&str], libtorch: Option<&str>, parts: &[&str]) {
        let output = self.start(packages, libtorch);
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(
            (output.status.code(), output.stdout.len(), text.lines().count()),
            (Some(3), 0, 1),
            "{text}"
        );
        for part in [&["error: ", "pip install torch==2.11.0"], parts].concat() {
            assert!(text.contains(part), "`{part}` is not in: {text}");
        }
    }
}

/// The python3 of the machine.
fn python() -> PathBuf {
    let folders = std::env::var("PATH").unwrap();
    let found = folders.split(':').map(|folder| Path::new(folder).join("python3")).find(|path| path.exists());
    found.expect("the tests need python3")
}

#[test]
fn it_starts_the_program_with_the_libtorch_of_python3() {
    let bundle = Bundle::new();
    bundle.torch("site", "2.11.0+cu130");
    fs::create_dir_all(bundle.path("site/nvidia/cu13/lib")).unwrap();
    bundle.starts(&["site"], None, &["site/torch/lib"]);
    // NVIDIA's libraries beside torch are reached by torch itself; those elsewhere are not.
    fs::create_dir_all(bundle.path("other/nvidia/cudnn/lib")).unwrap();
    bundle.starts(&["empty", "site", "other"], None, &["site/torch/lib", "other/nvidia/cudnn/lib"]);
    bundle.torch("site", "2.11.3");
    bundle.starts(&["site"], None, &["site/torch/lib"]);
}

#[test]
fn libtorch_wins_over_python3() {
    let bundle = Bundle::new();
    bundle.torch("site", "2.11.0");
    bundle.torch("own", "2.11.1");
    bundle.starts(&["site"], Some("own/torch"), &["own/torch/lib"]);
    bundle.write("archive/build-version", "2.11.0+cu130\n");
    bundle.write("archive/lib/libtorch_cuda.so", "");
    bundle.starts(&["site"], Some("archive"), &["archive/lib"]);
    bundle.refuses(&["site"], Some("nowhere"), &["LIBTORCH=", "nowhere", "no libtorch"]);
}

#[test]
fn a_missing_or_unfit_pytorch_is_one_sentence_and_exit_code_3() {
    let bundle = Bundle::new();
    bundle.refuses(&["empty"], None, &["no PyTorch was found"]);
    // A folder of that name where the user stands is no package.
    fs::create_dir_all(bundle.path("torch")).unwrap();
    bundle.refuses(&["empty"], None, &["no PyTorch was found"]);
    for version in ["2.10.0+cu128", "2.1.1", "2.111.0"] {
        bundle.torch("site", version);
        let number = version.split('+').next().unwrap();
        bundle.refuses(&["site"], None, &[&format!("version {number},"), "needs 2.11"]);
    }
    bundle.torch("site", "2.11.0+cpu");
    fs::remove_file(bundle.path("site/torch/lib/libtorch_cuda.so")).unwrap();
    bundle.refuses(&["site"], None, &["without CUDA"]);
    bundle.script("tools/python3", "#!/bin/sh\nexit 127\n");
    bundle.refuses(&["site"], None, &["no PyTorch was found"]);
}
