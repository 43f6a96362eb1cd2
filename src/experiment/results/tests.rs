use std::fs;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use super::{ResultsFile, Row, Status, read, recorded};
use crate::data::Split;
use crate::error::Error;
use crate::files::beside;

fn row(run: usize, evaluated_on: &str) -> Row {
    Row {
        run: format!("{run:016x}"),
        experiment: "glue, \"small\"".into(),
        task: "rte".into(),
        evaluated_on: evaluated_on.into(),
        split: "validation".into(),
        learning_rate: 4e-5,
        score: Some(0.1 + run as f64),
        started_at: "2026-01-01T00:00:00Z".into(),
        ..Row::default()
    }
}

fn failed(run: usize, evaluated_on: &str) -> Row {
    Row {
        status: Status::Failed,
        reason: Some("out of memory".into()),
        score: None,
        ..row(run, evaluated_on)
    }
}

fn place() -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("results.csv");
    (folder, path)
}

/// The runs among the first few that need not be done again.
fn finished(results: &ResultsFile) -> Vec<usize> {
    let recorded = results.recorded().unwrap();
    (0..9).filter(|&number| recorded.has(&row(number, "").run, [])).collect()
}

#[test]
fn a_run_is_done_when_each_data_set_has_a_row_that_did_not_fail() {
    let (_folder, path) = place();
    let results = ResultsFile::open(&path).unwrap();
    let on = |data: &str| Row { evaluated_sha256: data.into(), split: "dev".into(), ..row(1, "snli") };
    results.append(&[on("old"), Row { status: Status::Diverged, ..row(2, "rte") }]).unwrap();
    let recorded = results.recorded().unwrap();
    assert!(recorded.has(&row(1, "").run, [("snli", Split::Dev, "old")]));
    // Changed data, another split, another task.
    for wanted in [("snli", Split::Dev, "new"), ("snli", Split::Test, "old"), ("mnli", Split::Dev, "old")] {
        assert!(!recorded.has(&row(1, "").run, [wanted]), "{wanted:?}");
    }
    assert_eq!(recorded.status(&row(1, "").run), Some(Status::Ok));
    assert_eq!(recorded.status(&row(2, "").run), Some(Status::Diverged));
    assert_eq!(recorded.status(&row(3, "").run), None);
    results.append(&[on("new")]).unwrap();
    assert!(results.recorded().unwrap().has(&row(1, "").run, [("snli", Split::Dev, "new")]));
}

#[test]
fn keeps_rows_in_the_order_of_completion() {
    let (folder, _) = place();
    let path = folder.path().join("new/folder/results.csv");
    let results = ResultsFile::open(&path).unwrap();
    assert_eq!(read(&path).unwrap(), []);
    assert_eq!(results.append(&[row(2, "rte"), row(2, "qnli")]).unwrap(), 2);
    assert_eq!(results.append(&[row(1, "rte")]).unwrap(), 1);
    assert_eq!(read(&path).unwrap(), [row(2, "rte"), row(2, "qnli"), row(1, "rte")]);
    let again = ResultsFile::open(&path).unwrap();
    assert_eq!(again.repaired(), None);
    assert_eq!(finished(&again), [1, 2]);
}

#[test]
fn drops_rows_that_are_there_already() {
    let (_folder, path) = place();
    let results = ResultsFile::open(&path).unwrap();
    results.append(&[row(1, "rte")]).unwrap();
    let later = Row { score: Some(0.9), ..row(1, "rte") };
    assert_eq!(results.append(&[later, row(1, "qnli"), row(1, "qnli")]).unwrap(), 1);
    assert_eq!(results.append(&[row(1, "rte")]).unwrap(), 0);
    assert_eq!(read(&path).unwrap(), [row(1, "rte"), row(1, "qnli")]);
}

#[test]
fn a_retried_run_takes_the_place_of_its_failed_rows() {
    let (_folder, path) = place();
    let results = ResultsFile::open(&path).unwrap();
    results.append(&[failed(1, "rte")]).unwrap();
    results.append(&[failed(2, "rte")]).unwrap();
    results.append(&[Row { status: Status::Diverged, ..row(3, "rte") }]).unwrap();
    assert_eq!(finished(&results), [3]);
    assert_eq!(results.append(&[row(1, "rte"), row(1, "qnli")]).unwrap(), 2);
    assert_eq!(results.append(&[failed(2, "rte")]).unwrap(), 1);
    let rows = read(&path).unwrap();
    let seen: Vec<_> =
        rows.iter().map(|row| (row.run.as_str(), row.evaluated_on.as_str(), row.status)).collect();
    let runs = [3, 1, 1, 2].map(|run| row(run, "").run);
    assert_eq!(
        seen,
        [
            (runs[0].as_str(), "rte", Status::Diverged),
            (runs[1].as_str(), "rte", Status::Ok),
            (runs[2].as_str(), "qnli", Status::Ok),
            (runs[3].as_str(), "rte", Status::Failed),
        ]
    );
    assert_eq!(finished(&results), [1, 3]);
    assert!(!path.with_file_name(".results.csv.partial").exists());
}

/// Files of two machines, joined: the run failed on one of them, and is there from the other.
#[test]
fn a_failed_row_beside_one_that_did_not_fail_goes_when_the_run_is_there() {
    let (_folder, path) = place();
    let results = ResultsFile::open(&path).unwrap();
    results.append(&[row(1, "rte"), row(2, "rte")]).unwrap();
    let one = fs::read_to_string(&path).unwrap();
    fs::remove_file(&path).unwrap();
    results.append(&[failed(1, "rte")]).unwrap();
    let other = fs::read_to_string(&path).unwrap();
    fs::write(&path, format!("{one}{}", other.lines().nth(1).unwrap().to_owned() + "\n")).unwrap();
    assert_eq!(finished(&results), [2]);
    assert_eq!(results.append(&[row(1, "rte")]).unwrap(), 0);
    assert_eq!((finished(&results), read(&path).unwrap()), (vec![1, 2], vec![row(1, "rte"), row(2, "rte")]));
}

#[test]
fn a_row_cut_off_anywhere_is_removed_and_done_again() {
    let (_folder, path) = place();
    let results = ResultsFile::open(&path).unwrap();
    results.append(&[row(1, "rte")]).unwrap();
    let start = fs::read(&path).unwrap().len();
    // A reason with commas and quotes, so that some cuts fall inside a quoted field.
    let last = Row { reason: Some("a, \"b\"".into()), status: Status::Diverged, ..row(2, "rte") };
    results.append(std::slice::from_ref(&last)).unwrap();
    let whole = fs::read(&path).unwrap();
    for cut in start..whole.len() - 1 {
        fs::write(&path, &whole[..cut]).unwrap();
        // Who only looks mends nothing.
        assert!(!recorded(&path).unwrap().has(&last.run, []));
        assert_eq!(fs::read(&path).unwrap(), whole[..cut]);
        let results = ResultsFile::open(&path).unwrap();
        assert_eq!(results.repaired().is_some(), cut > start, "cut at {cut}");
        assert_eq!(fs::read(&path).unwrap(), whole[..start], "cut at {cut}");
        assert_eq!(finished(&results), [1]);
        assert_eq!(results.append(std::slice::from_ref(&last)).unwrap(), 1);
        assert_eq!(fs::read(&path).unwrap(), whole, "cut at {cut}");
    }
    // An editor may leave the last newline away; the row is all there.
    fs::write(&path, &whole[..whole.len() - 1]).unwrap();
    assert!(recorded(&path).unwrap().has(&last.run, []));
    let results = ResultsFile::open(&path).unwrap();
    assert_eq!((results.repaired(), fs::read(&path).unwrap()), (None, whole));
    assert_eq!(finished(&results), [1, 2]);
}

#[test]
fn a_file_that_is_refused_stays_as_it_is() {
    let (_folder, path) = place();
    ResultsFile::open(&path).unwrap().append(&[row(1, "rte")]).unwrap();
    let conflict = [fs::read(&path).unwrap(), b"=======\n>>>>>>> theirs\n".to_vec()].concat();
    fs::write(&path, &conflict).unwrap();
    assert!(ResultsFile::open(&path).is_err());
    assert_eq!(fs::read(&path).unwrap(), conflict);
}

#[test]
fn a_header_cut_off_anywhere_is_written_again() {
    let (_folder, path) = place();
    ResultsFile::open(&path).unwrap();
    let header = fs::read(&path).unwrap();
    assert!(header.starts_with(b"schema_version,experiment,run,") && header.ends_with(b",started_at\n"));
    for cut in 0..header.len() {
        fs::write(&path, &header[..cut]).unwrap();
        ResultsFile::open(&path).unwrap();
        assert_eq!(fs::read(&path).unwrap(), header, "cut at {cut}");
    }
}

#[test]
fn mends_what_another_process_left_before_appending() {
    let (_folder, path) = place();
    let results = ResultsFile::open(&path).unwrap();
    results.append(&[row(1, "rte")]).unwrap();
    let mut bytes = fs::read(&path).unwrap();
    // A line end does not make a row whole: a crash of the machine may lose blocks before it.
    bytes.extend_from_slice(b"1,glue,0000\n");
    fs::write(&path, bytes).unwrap();
    results.append(&[row(2, "rte")]).unwrap();
    assert_eq!(read(&path).unwrap(), [row(1, "rte"), row(2, "rte")]);
    assert!(results.repaired().unwrap().contains("(12 bytes, of run `0000`)"), "{:?}", results.repaired());
}

#[test]
fn survives_windows_line_ends_and_deletion() {
    let (_folder, path) = place();
    let results = ResultsFile::open(&path).unwrap();
    results.append(&[failed(1, "rte")]).unwrap();
    results.append(&[row(2, "rte")]).unwrap();
    let text = fs::read_to_string(&path).unwrap().replace('\n', "\r\n");
    fs::write(&path, &text[..text.len() - 5]).unwrap();
    let results = ResultsFile::open(&path).unwrap();
    assert!(results.repaired().is_some());
    assert!(fs::read(&path).unwrap().ends_with(b"Z\r\n"));
    results.append(&[row(1, "rte")]).unwrap();
    assert_eq!(read(&path).unwrap(), [row(1, "rte")]);
    fs::remove_file(&path).unwrap();
    results.append(&[row(3, "rte")]).unwrap();
    assert_eq!(read(&path).unwrap(), [row(3, "rte")]);
}

#[test]
fn two_writers_never_write_a_run_twice() {
    let (_folder, path) = place();
    std::thread::scope(|scope| {
        for writer in 0..2 {
            let path = &path;
            scope.spawn(move || {
                let results = ResultsFile::open(path).unwrap();
                for step in 0..40 {
                    // One counts up, one down, so that both meet runs of the other.
                    let run = if writer == 0 { step } else { 39 - step };
                    if let Some(_claim) = results.claim(&row(run, "").run).unwrap() {
                        let rows = match run % 4 {
                            0 => vec![row(run, "rte"), row(run, "qnli")],
                            1 => vec![failed(run, "rte")],
                            _ => vec![row(run, "rte")],
                        };
                        results.append(&rows).unwrap();
                    }
                }
            });
        }
    });
    let mut keys: Vec<_> =
        read(&path).unwrap().into_iter().map(|row| (row.run, row.evaluated_on, row.split)).collect();
    assert_eq!(keys.len(), 50);
    keys.sort();
    keys.dedup();
    assert_eq!(keys.len(), 50);
    assert!(!beside(&path, ".claims").exists());
}

#[test]
fn a_run_is_claimed_once() {
    let (_folder, path) = place();
    let (first, second) = (ResultsFile::open(&path).unwrap(), ResultsFile::open(&path).unwrap());
    let run = row(1, "").run;
    let claim = first.claim(&run).unwrap();
    assert!(claim.is_some());
    assert!(second.claim(&run).unwrap().is_none());
    drop(claim);
    assert!(!beside(&path, ".claims").exists());
    assert!(second.claim(&run).unwrap().is_some());
    assert!(matches!(first.claim("../escape").unwrap_err(), Error::Configuration(_)));
}

#[test]
fn a_claim_that_a_killed_process_left_holds_nothing() {
    let (_folder, path) = place();
    let results = ResultsFile::open(&path).unwrap();
    let run = row(1, "").run;
    fs::create_dir(beside(&path, ".claims")).unwrap();
    fs::write(beside(&path, ".claims").join(&run), "").unwrap();
    assert!(results.claim(&run).unwrap().is_some());
    assert!(!beside(&path, ".claims").exists());
}

#[test]
fn sources_are_released_by_the_last_who_needs_them() {
    let (_folder, path) = place();
    let (first, second) = (ResultsFile::open(&path).unwrap(), ResultsFile::open(&path).unwrap());
    let ids = |ids: &str| ids.split(' ').map(str::to_owned).collect();
    let (of_first, of_second) =
        (first.need_sources(ids("a b c")).unwrap(), second.need_sources(ids("b c d")).unwrap());
    // A killed process that needed everything, and one that comes to look.
    fs::write(beside(&path, ".claims").join("sources-7"), "a\nb\nc\nd\n").unwrap();
    let _third = ResultsFile::open(&path).unwrap();
    let removed = |results: &ResultsFile, needed| {
        let mut removed = Vec::new();
        results.release_sources(needed, |source| removed.push(source.to_owned())).unwrap();
        removed
    };
    assert_eq!(removed(&first, of_first), ["a"]);
    assert_eq!(removed(&second, of_second), ["b", "c", "d"]);
    assert!(!beside(&path, ".claims").exists());
}

#[test]
fn refuses_foreign_files_and_leaves_them_alone() {
    let (_folder, path) = place();
    let header = {
        ResultsFile::open(&path).unwrap();
        fs::read_to_string(&path).unwrap()
    };
    let message = |text: &str| {
        fs::write(&path, text).unwrap();
        let error = ResultsFile::open(&path).unwrap_err();
        assert!(matches!(error, Error::Configuration(_)), "{error:?}");
        assert_eq!(fs::read_to_string(&path).unwrap(), text);
        let message = error.to_string();
        assert!(message.starts_with(&path.display().to_string()), "{message}");
        message
    };
    assert!(message("name,score\nx,1").contains("column 1 is `name`, expected `schema_version`"));
    let renamed = header.replace(",task,", ",dataset,");
    assert!(message(&renamed).contains("column 9 is `dataset`, expected `task`"));
    let shorter = header.replace(",started_at", "");
    assert!(message(&shorter).contains("is the end of the line, expected `started_at`"));
    let longer = header.replace(",started_at", ",started_at,mood");
    assert!(message(&longer).contains("is `mood`, expected the end of the line"));
    assert!(message("schema_version,shape\n7,round\n").contains("has schema version `7`"));
    let newer = format!("{header}7{}\n", ",x".repeat(header.matches(',').count()));
    assert!(message(&newer).contains(":2: has schema version `7`"));
}

#[test]
fn refuses_a_broken_row_in_the_middle() {
    let (_folder, path) = place();
    let results = ResultsFile::open(&path).unwrap();
    results.append(&[row(1, "rte")]).unwrap();
    let text = fs::read_to_string(&path).unwrap();
    let (header, line) = text.split_once('\n').unwrap();
    let broken = format!("{header}\n{}{line}", line.replace(",0.00004,", ",fast,"));
    fs::write(&path, &broken).unwrap();
    let error = ResultsFile::open(&path).unwrap_err().to_string();
    assert!(error.contains(":2: column `learning_rate`"), "{error}");
    // A run that was being trained meanwhile is saved all the same.
    results.append(&[row(2, "rte")]).unwrap();
    assert!(fs::read_to_string(&path).unwrap().starts_with(&broken));
}

#[test]
fn refuses_places_that_cannot_be_written() {
    let (folder, _) = place();
    let blocked = folder.path().join("file");
    fs::write(&blocked, "").unwrap();
    let error = ResultsFile::open(blocked.join("results/grid.csv")).unwrap_err();
    assert!(matches!(error, Error::Environment(_)), "{error:?}");
    assert!(error.to_string().contains("make it writable, or name another place with `results:`"), "{error}");
    let error = ResultsFile::open(folder.path()).unwrap_err();
    assert!(error.to_string().contains("is a folder; name a file in it"), "{error}");
}

#[cfg(unix)]
#[test]
fn refuses_a_read_only_folder() {
    use std::os::unix::fs::PermissionsExt;

    let (folder, path) = place();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o555)).unwrap();
    if fs::write(folder.path().join("probe"), "").is_ok() {
        eprintln!("skipped: this user may write to read-only folders, as root may");
        return;
    }
    let error = ResultsFile::open(&path).unwrap_err();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
    assert!(matches!(error, Error::Environment(_)), "{error:?}");
}

#[cfg(unix)]
#[test]
fn a_link_stays_a_link() {
    let (folder, path) = place();
    let link = folder.path().join("link.csv");
    ResultsFile::open(&path).unwrap();
    std::os::unix::fs::symlink(&path, &link).unwrap();
    ResultsFile::open(&link).unwrap().append(&[row(1, "rte"), row(1, "qnli")]).unwrap();
    assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
    assert_eq!(read(Path::new(&path)).unwrap().len(), 2);
}
