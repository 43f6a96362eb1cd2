//! Every format gives the values that torch wrote, whatever the layout and type of the tensors.

use std::path::Path;

use child_tuning::data::TaskCard;
use child_tuning::model::{Classifier, HeadStart, Labels, ModelFolder, Weights};
use sha2::{Digest, Sha256};
use tch::{Device, Kind, Tensor};

use crate::support::{archive, fixture, folder, refusal, says};

/// Requires that the weights are those of a safetensors file of float32 tensors, bit for bit; those without a twin are
/// returned.
fn assert_equal_to_twin(weights: &Weights, twin: &[u8]) -> Vec<String> {
    let twin = safetensors::SafeTensors::deserialize(twin).unwrap();
    assert!(twin.len() > 3);
    for (name, view) in twin.iter() {
        let tensor = weights.tensor(name).unwrap();
        let shape: Vec<i64> = view.shape().iter().map(|&size| size as i64).collect();
        assert_eq!(tensor.size(), shape, "{name}");
        assert_eq!(weights.get(name).unwrap().shape, shape, "{name}");
        let expected = Tensor::from_data_size(view.data(), &shape, Kind::Float);
        assert!(tensor.equal(&expected), "{name} differs");
    }
    weights.names().filter(|name| twin.tensor(name).is_err()).map(str::to_owned).collect()
}

fn sha256_of(parts: &[Vec<u8>]) -> String {
    Sha256::digest(parts.concat()).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn every_layout_and_type_loads_from_both_forms_of_torch_save() {
    let twin = fixture("odd/model.safetensors");
    for form in ["odd/archive.bin", "odd/legacy.bin"] {
        let bytes = fixture(form);
        let folder = folder(&[("pytorch_model.bin", &bytes)]);
        let weights = Weights::open(folder.path()).unwrap();
        assert_eq!(assert_equal_to_twin(&weights, &twin), ["flags", "integers"], "{form}");
        let message = weights.tensor("integers").unwrap_err().to_string();
        says(
            &message,
            &["pytorch_model.bin: tensor integers has type LongStorage", "must be floating point"],
        );
        says(&weights.tensor("absent").unwrap_err().to_string(), &["has no tensor absent"]);
        assert_eq!(weights.sha256().unwrap(), sha256_of(&[bytes]), "{form}");
    }
}

#[test]
fn safetensors_in_half_precision_become_float32() {
    let views = |dtype, bytes| safetensors::tensor::TensorView::new(dtype, vec![2], bytes).unwrap();
    let tensors = [
        ("half", views(safetensors::Dtype::F16, &[0x00, 0x3c, 0x00, 0xc1])),
        ("bfloat16", views(safetensors::Dtype::BF16, &[0x80, 0x3f, 0x20, 0xc0])),
    ];
    let bytes = safetensors::serialize(tensors, None).unwrap();
    let folder = folder(&[("model.safetensors", &bytes)]);
    let weights = Weights::open(folder.path()).unwrap();
    for name in ["half", "bfloat16"] {
        assert_eq!(Vec::<f32>::try_from(weights.tensor(name).unwrap()).unwrap(), [1.0, -2.5], "{name}");
    }
    assert_eq!(weights.sha256().unwrap(), sha256_of(&[bytes]));
}

#[test]
fn shards_give_the_tensors_of_one_file() {
    let twin = fixture("shards/model.safetensors");
    let forms =
        [("model", "safetensors", "model.safetensors"), ("pytorch_model", "bin", "pytorch_model.bin")];
    for (stem, ending, file) in forms {
        let index = format!("{file}.index.json");
        let names: Vec<String> =
            (1..=4).map(|shard| format!("{stem}-0000{shard}-of-00004.{ending}")).collect();
        let contents: Vec<Vec<u8>> = names.iter().map(|name| fixture(&format!("shards/{name}"))).collect();
        let index_bytes = fixture(&format!("shards/{index}"));
        let mut files: Vec<(&str, &[u8])> = vec![(&index, &index_bytes)];
        files.extend(names.iter().zip(&contents).map(|(name, bytes)| (name.as_str(), bytes.as_slice())));
        let folder = folder(&files);
        let weights = Weights::open(folder.path()).unwrap();
        assert!(assert_equal_to_twin(&weights, &twin).is_empty());
        assert_eq!(weights.path(), folder.path().join(&index));
        assert_eq!(weights.sha256().unwrap(), sha256_of(&contents));
        // One whole file goes before shards, and safetensors before pickles.
        let whole = fixture("odd/model.safetensors");
        std::fs::write(folder.path().join("model.safetensors"), &whole).unwrap();
        let weights = Weights::open(folder.path()).unwrap();
        assert!(assert_equal_to_twin(&weights, &whole).is_empty());
    }
}

#[test]
fn a_link_to_the_weights_is_followed_as_in_the_cache_of_the_hub() {
    let blobs = folder(&[("0a1b", &fixture("odd/archive.bin"))]);
    let snapshot = folder(&[]);
    let link = |target: &str| {
        let place = snapshot.path().join("pytorch_model.bin");
        let _ = std::fs::remove_file(&place);
        std::os::unix::fs::symlink(blobs.path().join(target), place).unwrap();
        Weights::open(snapshot.path())
    };
    assert_equal_to_twin(&link("0a1b").unwrap(), &fixture("odd/model.safetensors"));
    let message = link("absent").map(|_| ()).unwrap_err().to_string();
    says(&message, &["cannot read", "pytorch_model.bin", "No such file"]);
}

#[test]
fn an_archive_of_another_writer_is_read() {
    // The same entries in another order, with the headers of another library.
    let original = fixture("odd/archive.bin");
    let mut zip = zip::ZipArchive::new(std::io::Cursor::new(&original)).unwrap();
    let mut entries = Vec::new();
    for index in (0..zip.len()).rev() {
        let mut entry = zip.by_index(index).unwrap();
        let mut bytes = Vec::new();
        std::io::Read::read_to_end(&mut entry, &mut bytes).unwrap();
        entries.push((entry.name().unwrap().into_owned(), bytes));
    }
    let entries: Vec<_> = entries.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice())).collect();
    let folder = folder(&[("pytorch_model.bin", &archive(&entries))]);
    assert_equal_to_twin(&Weights::open(folder.path()).unwrap(), &fixture("odd/model.safetensors"));
}

#[test]
fn a_bert_of_2018_loads_as_its_twin_of_today() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/weights/old_bert");
    let labels = Labels::from(&TaskCard::builtin("cola").unwrap().objective);
    let opened = ModelFolder::open(&path).unwrap();
    let classifier = Classifier::load(&opened, labels, HeadStart::Keep, Device::Cpu).unwrap();
    let twin = fixture("old_bert/twin.safetensors");
    let twin = safetensors::SafeTensors::deserialize(&twin).unwrap();
    let mut compared = 0;
    for (id, parameter) in classifier.parameters.iter() {
        let Ok(view) = twin.tensor(&parameter.name) else { continue };
        let expected = Tensor::from_data_size(view.data(), &parameter.shape, Kind::Float);
        assert!(classifier.parameters.leaf(id).equal(&expected), "{}", parameter.name);
        compared += 1;
    }
    assert_eq!(compared, twin.len());
    assert_eq!(classifier.report.fresh, ["classifier.weight", "classifier.bias"]);
    assert!(classifier.report.unexpected.is_empty(), "{:?}", classifier.report);
    // The decoder, tied to the embeddings, is one of them.
    assert!(classifier.report.ignored.iter().any(|name| name == "cls.predictions.decoder.weight"));
    let text = classifier.report.summary().unwrap();
    assert_eq!(text, "left out 9 tensors of pretraining (such as cls.predictions.bias)");
}

#[test]
fn what_is_no_weights_is_named() {
    let looked_for = [
        "has no weights: looked for model.safetensors, model.safetensors.index.json, pytorch_model.bin, \
         pytorch_model.bin.index.json",
        "save_pretrained",
    ];
    says(&refusal(&[("tf_model.h5", b"")]), &looked_for);
    let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n";
    for file in ["model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"] {
        says(&refusal(&[(file, pointer)]), &[file, "pointer of Git LFS", "git lfs pull"]);
    }
    let folder = folder(&[]);
    std::fs::create_dir(folder.path().join("model.safetensors")).unwrap();
    let message = Weights::open(folder.path()).map(|_| ()).unwrap_err().to_string();
    says(&message, &["model.safetensors: is not a file"]);
}
