//! Thousands of damaged files: every one is read or refused, none ends the program or takes memory that its size does not
//! explain. `CHILD_TUNING_MUTATIONS=1000000 cargo test --test weights mutations` tries that many.

use child_tuning::model::Weights;
use tempfile::TempDir;

use crate::support::{
    call, fixture, global, integer, integers, saved, state_dict, storage, tensor, text, tuple,
};

/// Random numbers of a seed (SplitMix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.0;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ (word >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }
}

/// Damages some bytes in one to four ways.
fn mutate(bytes: &mut Vec<u8>, random: &mut Random) {
    const NUMBERS: [u64; 10] =
        [0, 1, 7, 0x7f, 0xff, 0xffff, 0x7fff_ffff, 0xffff_ffff, i64::MAX as u64, u64::MAX];
    for _ in 0..1 + random.below(4) {
        if bytes.is_empty() {
            return;
        }
        let at = random.below(bytes.len());
        let end = (at + 1 + random.below(40)).min(bytes.len());
        match random.below(8) {
            0 => bytes[at] ^= 1 << random.below(8),
            1 => bytes[at] = random.next() as u8,
            2 => {
                let number = NUMBERS[random.below(NUMBERS.len())].to_le_bytes();
                let width = [1, 2, 4, 8][random.below(4)].min(bytes.len() - at);
                bytes[at..at + width].copy_from_slice(&number[..width]);
            }
            3 => drop(bytes.drain(at..end)),
            4 => {
                let part = bytes[at..end].to_vec();
                let place = random.below(bytes.len());
                bytes.splice(place..place, part);
            }
            5 => {
                let place = random.below(bytes.len() - (end - at) + 1);
                bytes.copy_within(at..end, place);
            }
            6 => bytes.insert(at, random.next() as u8),
            _ => bytes.truncate(at.max(bytes.len() / 2)),
        }
    }
}

/// Makes a value out of operations that mostly make sense.
fn value(random: &mut Random, depth: usize) -> Vec<u8> {
    let small = |random: &mut Random| [0, 1, 2, 3, 4, -1, 7, i64::MAX][random.below(8)];
    let inner = |random: &mut Random| if depth == 0 { integer(2) } else { value(random, depth - 1) };
    match random.below(12) {
        0 => integer(small(random)),
        1 => text(["a", "b", "storage", "0", "weight"][random.below(5)]),
        2 => [&b"N"[..], b"\x88", b"]", b"}", b")", b"h\x00", b"h\x01"][random.below(7)].to_vec(),
        3 => tuple(&[inner(random), inner(random)]),
        4 => [inner(random), vec![b'q', random.below(3) as u8]].concat(),
        5 => [b"](".to_vec(), inner(random), inner(random), b"e".to_vec()].concat(),
        6 => [b"}(".to_vec(), inner(random), inner(random), b"u".to_vec()].concat(),
        7 => call(global("collections", "OrderedDict"), &[]),
        8 => call(global("torch._utils", "_rebuild_parameter"), &[inner(random), inner(random)]),
        9 => call(
            global("torch._utils", "_rebuild_tensor_v2"),
            &[inner(random), integer(small(random)), integers(&[small(random)]), inner(random)],
        ),
        10 => [inner(random), vec![random.next() as u8]].concat(),
        _ => {
            let class = ["FloatStorage", "HalfStorage", "LongStorage", "DoubleStorage"][random.below(4)];
            let storage = storage(class, "0", [4, 8, 2, 1][random.below(4)]);
            let dimensions = random.below(4);
            let mut sizes = || (0..dimensions).map(|_| small(random)).collect::<Vec<_>>();
            let (shape, strides) = (sizes(), sizes());
            tensor(storage, small(random), &shape, &strides)
        }
    }
}

/// Makes a pickle of a dictionary of random values.
fn pickle(random: &mut Random) -> Vec<u8> {
    let items = (0..1 + random.below(4)).flat_map(|item| [text(&format!("t{item}")), value(random, 3)]);
    state_dict(&items.collect::<Vec<_>>())
}

/// A folder whose weights are written anew for each case.
struct Workplace {
    folder: TempDir,
    seeds: Vec<(&'static str, Vec<u8>)>,
}

impl Workplace {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        for shard in 1..=4 {
            for name in [
                format!("model-0000{shard}-of-00004.safetensors"),
                format!("pytorch_model-0000{shard}-of-00004.bin"),
            ] {
                std::fs::write(folder.path().join(&name), fixture(&format!("shards/{name}"))).unwrap();
            }
        }
        let seeds = vec![
            ("model.safetensors", fixture("odd/model.safetensors")),
            ("model.safetensors.index.json", fixture("shards/model.safetensors.index.json")),
            ("pytorch_model.bin", fixture("odd/archive.bin")),
            ("pytorch_model.bin", fixture("odd/legacy.bin")),
            ("pytorch_model.bin.index.json", fixture("shards/pytorch_model.bin.index.json")),
        ];
        Self { folder, seeds }
    }

    /// Tries one file. Returns how many tensors were read, or nothing if the file was refused.
    fn try_case(&self, case: u64) -> Option<usize> {
        let mut random = Random(case);
        let kind = random.below(self.seeds.len() + 2);
        let (name, mut bytes) = match self.seeds.get(kind) {
            Some((name, bytes)) => (*name, bytes.clone()),
            None => ("pytorch_model.bin", saved(&pickle(&mut random), &[0; 16])),
        };
        if kind <= self.seeds.len() {
            mutate(&mut bytes, &mut random);
        }
        let path = self.folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        let opened = Weights::open(self.folder.path());
        let result = match &opened {
            Ok(weights) => {
                weights.sha256().unwrap();
                // The elements of a repeating tensor may be more than memory holds; it is the caller who knows a shape.
                let small = |name: &&str| weights.get(name).is_some_and(|tensor| tensor.count() < 1 << 16);
                let read = weights.names().filter(small).filter(|name| weights.tensor(name).is_ok());
                Some(read.count())
            }
            Err(error) => {
                let text = error.to_string();
                assert!(text.len() < 1500 && !text.contains(char::is_control), "case {case}: {text:?}");
                None
            }
        };
        std::fs::remove_file(path).unwrap();
        result
    }
}

/// Says which case it was, if one panics.
struct Case(u64);

impl Drop for Case {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("case {}", self.0);
        }
    }
}

/// The most memory that this process has had so far, in bytes; nothing where the system does not say.
fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix(" kB")?.parse::<u64>().ok()? * 1024)
}

#[test]
fn mutations_are_read_or_refused() {
    let cases = std::env::var("CHILD_TUNING_MUTATIONS").map_or(4000, |text| text.parse().unwrap());
    let workplace = Workplace::new();
    // What the first use of the libraries takes is not of the files.
    for case in 0..200 {
        workplace.try_case(case);
    }
    let before = peak_memory();
    let (mut opened, mut tensors) = (0u64, 0);
    for case in 0..cases {
        let _case = Case(case);
        if let Some(read) = workplace.try_case(case) {
            opened += 1;
            tensors += read;
        }
    }
    // The mutations must reach both ends: files that stay readable, and files that do not.
    assert!(opened > cases / 50 && opened < cases / 2, "{opened} of {cases} files opened");
    assert!(tensors as u64 > opened, "{tensors} tensors in {opened} files");
    if let (Some(before), Some(after)) = (before, peak_memory()) {
        // Other tests of this process make files of 16 megabytes meanwhile.
        assert!(after - before < 256 << 20, "memory grew by {} bytes", after - before);
    }
}
