//! Files out of a ZIP archive, and nothing beside them.

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;

use zip::ZipArchive;
use zip::result::ZipError;

use super::write_fault;
use crate::error::{Error, Result};

/// Extracts files that stand in the folder `within` of an archive into `target`; those of `optional` may be missing.
///
/// # Errors
///
/// [`Error::Data`] if the archive is damaged, lacks a file, holds a name that leads out of the folder, or a link in
/// place of a file; errors of writing.
pub(super) fn unpack(
    archive: &Path,
    within: &str,
    files: &[String],
    optional: &[String],
    target: &Path,
) -> Result<()> {
    let fault = |message: String| Error::data(archive, 0, message);
    let file = File::open(archive).map_err(Error::io("read", archive))?;
    let mut zip =
        ZipArchive::new(file).map_err(|error| fault(format!("is no usable ZIP archive: {error}")))?;
    for index in 0..zip.len() {
        let entry = zip.by_index_raw(index).map_err(|error| fault(format!("is damaged: {error}")))?;
        let name = entry.name().unwrap_or_default();
        // An absolute name would be made relative there.
        if entry.enclosed_name().is_none() || name.starts_with(['/', '\\']) {
            return Err(fault(format!(
                "holds `{name}`, which leads out of its folder; nothing was extracted"
            )));
        }
    }
    for (name, needed) in
        files.iter().map(|name| (name, true)).chain(optional.iter().map(|name| (name, false)))
    {
        let inside = if within.is_empty() { name.clone() } else { format!("{within}/{name}") };
        let mut entry = match zip.by_name(&inside) {
            Err(ZipError::FileNotFound) if !needed => continue,
            Err(ZipError::FileNotFound) => return Err(fault(format!("holds no `{inside}`"))),
            entry => entry.map_err(|error| fault(format!("has a damaged `{inside}`: {error}")))?,
        };
        if !entry.is_file() {
            return Err(fault(format!("holds `{inside}` as a link or a folder, not as a file")));
        }
        let path = target.join(name);
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(write_fault(folder))?;
        }
        let mut output = File::create(&path).map_err(write_fault(&path))?;
        let mut block = vec![0; 64 * 1024];
        loop {
            let count = entry
                .read(&mut block)
                .map_err(|error| fault(format!("has a damaged `{inside}`: {error}")))?;
            if count == 0 {
                break;
            }
            output.write_all(&block[..count]).map_err(write_fault(&path))?;
        }
        output.sync_all().map_err(write_fault(&path))?;
    }
    Ok(())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use std::io::Cursor;

    use zip::ZipWriter;
    use zip::write::SimpleFileOptions;

    /// Makes an archive; content that starts with `->` is the target of a link.
    pub fn archive(entries: &[(&str, &str)]) -> Vec<u8> {
        let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
        for (name, content) in entries {
            match content.strip_prefix("->") {
                Some(target) => zip.add_symlink(name, target, SimpleFileOptions::default()).unwrap(),
                None => {
                    zip.start_file(name, SimpleFileOptions::default()).unwrap();
                    zip.write_all(content.as_bytes()).unwrap();
                }
            }
        }
        zip.finish().unwrap().into_inner()
    }

    fn unpacked(bytes: &[u8], within: &str) -> (tempfile::TempDir, Result<()>) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.zip");
        std::fs::write(&path, bytes).unwrap();
        let target = folder.path().join("inner/target");
        std::fs::create_dir_all(&target).unwrap();
        let names = |names: &[&str]| names.iter().map(|name| name.to_string()).collect::<Vec<_>>();
        let result = unpack(&path, within, &names(&["a.tsv", "deep/b.tsv"]), &names(&["c.txt"]), &target);
        (folder, result)
    }

    #[test]
    fn the_named_files_are_extracted_and_no_others() {
        let long = "row\n".repeat(100_000);
        let bytes = archive(&[
            ("X/a.tsv", &long),
            ("X/deep/b.tsv", "b"),
            ("X/c.txt", "c"),
            ("X/d", "d"),
            ("a.tsv", "-"),
        ]);
        let (folder, result) = unpacked(&bytes, "X");
        result.unwrap();
        let target = folder.path().join("inner/target");
        assert_eq!(std::fs::read_to_string(target.join("a.tsv")).unwrap(), long);
        assert_eq!(std::fs::read_to_string(target.join("deep/b.tsv")).unwrap(), "b");
        assert_eq!(std::fs::read_dir(target).unwrap().count(), 3);
        let (folder, result) = unpacked(&archive(&[("a.tsv", "a"), ("deep/b.tsv", "b")]), "");
        result.unwrap();
        assert!(!folder.path().join("inner/target/c.txt").exists());
    }

    #[test]
    fn archives_that_lead_out_of_their_folder_are_refused_as_a_whole() {
        for name in ["../escaped", "X/../../escaped", "/tmp/escaped"] {
            let bytes = archive(&[("X/a.tsv", "a"), ("X/deep/b.tsv", "b"), (name, "x")]);
            let (folder, result) = unpacked(&bytes, "X");
            let message = result.unwrap_err().to_string();
            assert!(message.contains(&format!("`{name}`")) && message.contains("leads out"), "{message}");
            assert_eq!(std::fs::read_dir(folder.path().join("inner/target")).unwrap().count(), 0);
            assert!(!folder.path().join("escaped").exists() && !folder.path().join("inner/escaped").exists());
        }
    }

    #[test]
    fn links_and_missing_and_damaged_files_are_refused() {
        let message = |bytes: &[u8]| unpacked(bytes, "X").1.unwrap_err().to_string();
        let link = message(&archive(&[("X/a.tsv", "->/etc/passwd"), ("X/deep/b.tsv", "b")]));
        assert!(link.contains("holds `X/a.tsv` as a link"), "{link}");
        let missing = message(&archive(&[("X/a.tsv", "a")]));
        assert!(missing.ends_with("a.zip: holds no `X/deep/b.tsv`"), "{missing}");
        assert!(message(b"no archive").contains("is no usable ZIP archive"));
        let mut bytes = archive(&[("X/a.tsv", "a".repeat(50).as_str()), ("X/deep/b.tsv", "b")]);
        // Behind the first local header, 30 bytes and the name, stand the compressed bytes.
        bytes[38] ^= 0xff;
        assert!(message(&bytes).contains("has a damaged `X/a.tsv`"));
    }
}
