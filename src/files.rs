//! Files that are never there in part.

use std::ffi::OsStr;
use std::fs::File;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Writes a file whole or not at all: `write` makes it in a hidden folder beside its place, and it is moved there once it is on
/// the disk. A link is followed, an old file's permissions stay, and what is no file, such as `/dev/stdout`, is written to
/// directly.
///
/// What a killed process left in the hidden folder, temporary files of other libraries included, goes the next time.
///
/// # Errors
/// Those of `write`, and an [`Error::Io`] if the file cannot be moved; nothing is left behind then.
pub fn write_whole(path: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let place = path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
    if is_pipe(&place) {
        return write(path);
    }
    let old = place.metadata().ok();
    let workshop = place.with_file_name(format!(".{}.partial", name_of(&place).to_string_lossy()));
    let temporary = workshop.join(name_of(&place));
    let _ = std::fs::remove_dir_all(&workshop).or_else(|_| std::fs::remove_file(&workshop));
    std::fs::create_dir(&workshop).map_err(Error::io("create", &workshop))?;
    let written = write(&temporary).and_then(|()| {
        let placed = || {
            let permissions = match &old {
                Some(old) => old.permissions(),
                None => permissions_of_new_files(&temporary)?,
            };
            std::fs::set_permissions(&temporary, permissions)?;
            File::open(&temporary)?.sync_all()?;
            std::fs::rename(&temporary, &place)?;
            File::open(folder_of(&place))?.sync_all()
        };
        placed().map_err(Error::io("write", path))
    });
    // Only tidiness: what stays goes the next time.
    let _ = std::fs::remove_dir_all(&workshop);
    written
}

/// Writes bytes as a whole file, as [`write_whole`] does.
///
/// # Errors
/// Fails if the file cannot be written.
pub fn write_bytes(path: &Path, bytes: &[u8]) -> Result<()> {
    write_whole(path, |temporary| std::fs::write(temporary, bytes).map_err(Error::io("write", path)))
}

/// Copies a file whole, as [`write_whole`] does.
///
/// # Errors
/// Fails if the file cannot be read or written.
pub fn copy_whole(source: &Path, path: &Path) -> Result<()> {
    write_whole(path, |temporary| {
        std::fs::copy(source, temporary).map(|_| ()).map_err(Error::io("copy", source))
    })
}

/// Returns the path of a file whose name is that of another one with a suffix.
pub fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = name_of(path).to_owned();
    name.push(suffix);
    path.with_file_name(name)
}

/// Returns the folder that a file is in, which for a bare name is the present one.
pub fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Returns whether a path is there and neither file nor folder, such as a pipe, which can be read only once.
pub fn is_pipe(path: &Path) -> bool {
    path.metadata().is_ok_and(|metadata| !metadata.is_file() && !metadata.is_dir())
}

fn name_of(path: &Path) -> &OsStr {
    path.file_name().unwrap_or(OsStr::new("file"))
}

/// Returns the permissions that the user's new files get. What other libraries make may be readable by its owner only.
fn permissions_of_new_files(beside_this: &Path) -> std::io::Result<std::fs::Permissions> {
    let plain = beside(beside_this, ".mode");
    let permissions = File::create(&plain)?.metadata()?.permissions();
    std::fs::remove_file(&plain)?;
    Ok(permissions)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_there_whole_or_as_before() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("scores.csv");
        let other = folder.path().join("scores.partial");
        std::fs::write(&other, "mine").unwrap();
        // Of a process that was killed.
        let workshop = folder.path().join(".scores.csv.partial");
        std::fs::create_dir(&workshop).unwrap();
        std::fs::write(workshop.join(".tmpAbC"), "half").unwrap();
        write_bytes(&path, b"one").unwrap();
        let failed = write_whole(&path, |temporary| {
            std::fs::write(temporary, b"tw").unwrap();
            Err(Error::Interrupted)
        });
        assert!(failed.is_err());
        assert_eq!(std::fs::read(&path).unwrap(), b"one");
        write_bytes(&path, b"three").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"three");
        std::fs::write(&workshop, "in the way").unwrap();
        write_bytes(&path, b"three").unwrap();
        assert_eq!(std::fs::read(&other).unwrap(), b"mine");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2, "nothing is left behind");
    }

    #[test]
    fn links_and_permissions_stay() {
        use std::os::unix::fs::{PermissionsExt, symlink};
        let folder = tempfile::tempdir().unwrap();
        let [path, link] = ["real", "link"].map(|name| folder.path().join(name));
        std::fs::write(&path, "").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
        symlink(&path, &link).unwrap();
        write_bytes(&link, b"new").unwrap();
        assert!(link.is_symlink());
        assert_eq!(std::fs::read(&path).unwrap(), b"new");
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o640);
        assert!(write_bytes(folder.path(), b"").is_err(), "a folder is no file");
        write_bytes(Path::new("/dev/null"), b"gone").unwrap();
    }
}
