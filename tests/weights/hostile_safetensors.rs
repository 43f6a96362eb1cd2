//! Damaged and hostile safetensors files and indices.

use crate::support::{fixture, refusal, refused_at_every_cut, says};

/// Makes a file of a header and so many bytes of data.
fn file(header: &str, data: usize) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &vec![0; data]].concat()
}

fn refused(bytes: &[u8], parts: &[&str]) {
    let message = refusal(&[("model.safetensors", bytes)]);
    says(&message, &["model.safetensors: ", "not a complete safetensors file", "download or save it again"]);
    says(&message, parts);
}

#[test]
fn headers_that_lie_are_refused() {
    refused(b"", &["no header"]);
    refused(&[1, 2, 3], &["no header"]);
    refused(&u64::MAX.to_le_bytes(), &["header is to have 18446744073709551615 bytes, where 0 are left"]);
    refused(&[&20_000_000u64.to_le_bytes()[..], b"{}"].concat(), &["20000000 bytes", "16777216 the most"]);
    let oversized = [&(17u64 << 20).to_le_bytes()[..], &vec![b' '; 17 << 20]].concat();
    refused(&oversized, &["17825792 bytes", "16777216 the most"]);
    refused(&file("{]", 0), &["JSON"]);
    refused(&file(&"[".repeat(100_000), 0), &["JSON"]);
    refused(&[&2u64.to_le_bytes()[..], &[0xff, 0xfe]].concat(), &["UTF-8"]);
}

#[test]
fn tensors_that_overlap_or_do_not_fit_are_refused() {
    let tensor = |name: &str, shape: &str, start: u64, end: u64| {
        format!(r#""{name}":{{"dtype":"F32","shape":{shape},"data_offsets":[{start},{end}]}}"#)
    };
    let two = |first: String, second: String| format!("{{{first},{second}}}");
    // One byte too few, too many; an overlap, a gap; a shape of another size, and of one beyond all numbers.
    let whole = two(tensor("a", "[2]", 0, 8), tensor("b", "[1]", 8, 12));
    assert!(std::panic::catch_unwind(|| refusal(&[("model.safetensors", &file(&whole, 12))])).is_err());
    refused(&file(&whole, 11), &["not fully covered"]);
    refused(&file(&whole, 13), &["not fully covered"]);
    refused(&file(&two(tensor("a", "[2]", 0, 8), tensor("b", "[1]", 4, 8)), 8), &["offset", "`b`"]);
    refused(&file(&two(tensor("a", "[2]", 0, 8), tensor("b", "[1]", 12, 16)), 16), &["offset", "`b`"]);
    refused(&file(&format!("{{{}}}", tensor("a", "[3]", 0, 8)), 8), &["shape"]);
    refused(&file(&format!("{{{}}}", tensor("a", "[4294967296,4294967296,2]", 0, 8)), 8), &["overflow"]);
    refused(&file(&format!("{{{}}}", tensor("a", "[0,18446744073709551615]", 0, 0)), 0), &["`a`", "beyond"]);
    refused(&file(&two(tensor("a", "[2]", 0, 8), tensor("a", "[2]", 0, 8)), 8), &["`a` is there twice"]);
    refused(&file(r#"{"a":{"dtype":"Q9","shape":[1],"data_offsets":[0,4]}}"#, 4), &["Q9"]);
}

#[test]
fn names_that_would_garble_a_message_are_refused() {
    for name in [r"a\u001b[2Jb", &"n".repeat(1001)] {
        let header = format!(r#"{{"{name}":{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}}}"#);
        let message = refusal(&[("model.safetensors", &file(&header, 4))]);
        says(&message, &["model.safetensors: ", "impossible name", "download or save it again"]);
        assert!(!message.contains('\x1b'), "{message:?}");
    }
}

#[test]
fn every_cut_of_a_file_is_refused() {
    refused_at_every_cut("model.safetensors", &fixture("odd/model.safetensors"));
}

#[test]
fn an_index_names_files_of_its_folder_only() {
    const INDEX: &str = "model.safetensors.index.json";
    let outside = tempfile::tempdir().unwrap();
    std::fs::write(outside.path().join("x"), file("{}", 0)).unwrap();
    let absolute = outside.path().join("x").display().to_string();
    for name in [
        "../x",
        "/etc/passwd",
        "a/../../x",
        "sub/x",
        "./x",
        "..",
        ".",
        "",
        "x\\..\\y",
        "x/",
        "x\\u0000",
        "x\\u001b[2J",
        &"x".repeat(300),
        &absolute,
    ] {
        // `x` is missing, but all names are looked at before any file is.
        let index = serde_json::json!({"weight_map": {"a": "x", "b": name}}).to_string();
        let message = refusal(&[(INDEX, index.as_bytes())]);
        says(&message, &[INDEX, "names the file", "must be files of the same folder"]);
    }
}

#[test]
fn shards_that_do_not_belong_together_are_refused() {
    const INDEX: &str = "model.safetensors.index.json";
    let name = |shard: usize| format!("model-0000{shard}-of-00004.safetensors");
    let shards: Vec<Vec<u8>> = (1..=4).map(|shard| fixture(&format!("shards/{}", name(shard)))).collect();
    let index = String::from_utf8(fixture("shards/model.safetensors.index.json")).unwrap();
    let with = |index: &str, shards: &[(usize, &[u8])]| {
        let names: Vec<String> = shards.iter().map(|&(shard, _)| name(shard)).collect();
        let mut files = vec![(INDEX, index.as_bytes())];
        files.extend(names.iter().zip(shards).map(|(name, (_, bytes))| (name.as_str(), *bytes)));
        refusal(&files)
    };
    let all: Vec<(usize, &[u8])> = (1..=4).zip(shards.iter().map(Vec::as_slice)).collect();

    let missing = with(&index, &all[..3]);
    says(&missing, &["model-00004-of-00004.safetensors: is missing", INDEX, "download the model again"]);
    let cut = with(&index, &[all[0], all[1], all[2], (4, &shards[3][..100])]);
    says(&cut, &["model-00004-of-00004.safetensors: ", "not a complete safetensors file"]);
    let twice = with(&index, &[all[0], all[1], all[2], (4, &shards[2])]);
    says(
        &twice,
        &[
            "model-00004-of-00004.safetensors: holds tensor `layer.3.weight`",
            "model-00003-of-00004.safetensors",
        ],
    );
    let absent = with(&index.replace("layer.2", "layer.9"), &all);
    says(
        &absent,
        &[INDEX, "model-00002-of-00004.safetensors holds tensor `layer.9.weight`, which it does not"],
    );
    let elsewhere = index.replace("layer.2.weight\": \"model-00002", "layer.2.weight\": \"model-00003");
    let elsewhere = elsewhere.replace("layer.3.weight\": \"model-00003", "layer.3.weight\": \"model-00002");
    says(&with(&elsewhere, &all), &[INDEX, "model-00003-of-00004.safetensors holds tensor `layer.2.weight`"]);
    let doubled = index.replace("layer.2", "layer.1");
    says(&with(&doubled, &all), &[INDEX, "`layer.1.weight` is there twice"]);
    says(&with("{\"weight_map\": {}}", &[]), &[INDEX, "names no files"]);
    says(&with("{\"metadata\": {}}", &[]), &[INDEX, "no index of shards", "weight_map"]);
    says(&with("{\"weight_map\": {\"a\": 3}}", &[]), &[INDEX, "no index of shards"]);
    says(&with("", &[]), &[INDEX, "no index of shards"]);
    says(&with(&format!("{{\"weight_map\": {}", "[".repeat(100_000)), &[]), &[INDEX, "no index of shards"]);
}
