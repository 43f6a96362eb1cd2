//! Pickles that ask for more than tensors, or for tensors that are not there.

use child_tuning::model::Weights;

use crate::support::{
    call, fixture, folder, global, integer, integers, refusal, saved, says, state_dict, storage, tensor,
    text, tuple,
};

/// Requires the refusal of a pickle in both forms of torch.save.
fn refused(pickle: &[u8], parts: &[&str]) {
    let message = refusal(&[("pytorch_model.bin", &saved(pickle, &[0; 16]))]);
    says(&message, &["pytorch_model.bin: "]);
    says(&message, parts);
    let legacy = [&legacy_beginning()[..], pickle].concat();
    let message = refusal(&[("pytorch_model.bin", &legacy)]);
    says(&message, &["pytorch_model.bin: "]);
    if parts.contains(&REFUSED) {
        says(&message, parts);
    }
}

/// The pickles before the `state_dict` in the older form.
fn legacy_beginning() -> Vec<u8> {
    let bytes = fixture("odd/legacy.bin");
    let ends: Vec<usize> = (0..bytes.len()).filter(|&at| bytes[at] == b'.').collect();
    bytes[..=ends[2]].to_vec()
}

/// Requires that one tensor is refused, on a storage of four float32 numbers.
fn refused_tensor(offset: i64, shape: &[i64], strides: &[i64]) {
    let item = tensor(storage("FloatStorage", "0", 4), offset, shape, strides);
    let pickle = state_dict(&[text("a"), item]);
    refused(&pickle, &["tensor `a` has shape", "does not fit its storage"]);
}

const REFUSED: &str = "it was refused, and nothing of it was executed";

#[test]
fn no_code_is_executed() {
    let marker = tempfile::tempdir().unwrap().keep();
    let command = format!("touch {}/executed", marker.display());
    let modules = [
        "os",
        "posix",
        "nt",
        "subprocess",
        "builtins",
        "__builtin__",
        "torch",
        "torch._utils",
        "collections",
    ];
    for module in modules {
        let pickle = [b"\x80\x02".to_vec(), call(global(module, "system"), &[text(&command)]), b".".to_vec()];
        refused(&pickle.concat(), &[&format!("asks for `{module}.system`"), REFUSED, "model.safetensors"]);
    }
    // What tools that hide code in models write, and names that look like allowed ones.
    for (module, name) in [
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("torch.serialization", "load"),
        ("torch.jit", "load"),
        ("torch.storage", "_load_from_bytes"),
        ("torch.nn.modules.linear", "Linear"),
        ("torch", "FloatStorage.from_file"),
        ("collections", "OrderedDict.update"),
        ("collections ", "OrderedDict"),
        ("torch._utils", "_rebuild_tensor_v2\r"),
        ("__torch__.model", "Model"),
    ] {
        refused(&[global(module, name), b")R.".to_vec()].concat(), &["asks for", REFUSED]);
    }
    let hidden =
        state_dict(&[text("a"), tensor(call(global("os", "system"), &[text(&command)]), 0, &[1], &[1])]);
    refused(&hidden, &["asks for `os.system`", REFUSED]);
    assert_eq!(std::fs::read_dir(&marker).unwrap().count(), 0);
    std::fs::remove_dir(marker).unwrap();
}

#[test]
fn operations_that_make_objects_are_refused_by_name() {
    let class = global("torch", "FloatStorage");
    let operation = |bytes: &[u8]| [class.clone(), bytes.to_vec()].concat();
    for (bytes, name) in [
        (operation(b")\x81."), "NEWOBJ"),
        (operation(b")}\x92."), "NEWOBJ_EX"),
        (b"(ios\nsystem\n.".to_vec(), "INST"),
        ([b"(".to_vec(), class.clone(), b"o.".to_vec()].concat(), "OBJ"),
        (b"\x80\x04\x95\0\0\0\0\0\0\0\0.".to_vec(), "FRAME"),
        (b"\x8c\x02os\x8c\x06system\x93.".to_vec(), "SHORT_BINUNICODE"),
        ([text("os"), text("system"), b"\x93.".to_vec()].concat(), "STACK_GLOBAL"),
        (b"\x82\x01.".to_vec(), "EXT"),
        (b"Pid\n.".to_vec(), "PERSID"),
        (b"N2.".to_vec(), "DUP"),
        (b"I1\n.".to_vec(), "INT"),
        (b"\xff.".to_vec(), "0xff"),
    ] {
        refused(&bytes, &[&format!("uses the operation {name}"), REFUSED]);
    }
    refused(&operation(b")R."), &["calls `torch.FloatStorage`", REFUSED]);
    refused(&[text("a"), b")R.".to_vec()].concat(), &["calls what is no function", REFUSED]);
    let with_arguments = call(global("collections", "OrderedDict"), &[b"]".to_vec()]);
    refused(&[with_arguments, b".".to_vec()].concat(), &["calls `OrderedDict` with arguments", REFUSED]);
}

#[test]
fn attributes_are_dropped_from_an_ordered_dict_and_refused_elsewhere() {
    let ordered = call(global("collections", "OrderedDict"), &[]);
    let attributes = [b"}(".to_vec(), text("_metadata"), ordered.clone(), b"u".to_vec()].concat();
    let item = tensor(storage("FloatStorage", "0", 4), 0, &[4], &[1]);
    let items = [b"(".to_vec(), text("a"), item.clone(), b"u".to_vec()].concat();
    let built = |object: &[u8], state: &[u8]| [object, state, b"b."].concat();
    let accepted = built(&[ordered.clone(), items].concat(), &attributes);
    let folder = folder(&[("pytorch_model.bin", &saved(&accepted, &[0; 16]))]);
    assert_eq!(Weights::open(folder.path()).unwrap().names().collect::<Vec<_>>(), ["a"]);
    for (object, state) in [
        (&b"}"[..], &attributes[..]),
        (b"]", &attributes),
        (&item, &attributes),
        (&ordered, b"]"),
        (&ordered, b"K\x01"),
    ] {
        refused(
            &built(object, state),
            &["BUILD on something other than the attributes of an OrderedDict", REFUSED],
        );
    }
}

#[test]
fn what_the_oldest_versions_wrote_is_read() {
    // A function with four arguments, and texts of Python 2.
    let arguments = [storage("HalfStorage", "0", 8), integer(2), integers(&[2, 3]), integers(&[1, 2])];
    let item = call(global("torch._utils", "_rebuild_tensor"), &arguments);
    let pickle = state_dict(&[b"U\x01a".to_vec(), item.clone(), b"T\x01\0\0\0b".to_vec(), item]);
    let numbers: Vec<u8> = (0..8u16).flat_map(|number| (0x3c00 + 0x40 * number).to_le_bytes()).collect();
    let folder = folder(&[("pytorch_model.bin", &saved(&pickle, &numbers))]);
    let weights = Weights::open(folder.path()).unwrap();
    assert_eq!(weights.names().collect::<Vec<_>>(), ["a", "b"]);
    // 1 + n / 16 for the elements 2 4 6 and 3 5 7.
    let values = Vec::<f32>::try_from(weights.tensor("b").unwrap().flatten(0, 1)).unwrap();
    assert_eq!(values, [2.0, 4.0, 6.0, 3.0, 5.0, 7.0].map(|number: f32| 1.0 + number / 16.0));
}

#[test]
fn tensors_lie_within_their_storage() {
    refused_tensor(0, &[5], &[1]);
    refused_tensor(1, &[4], &[1]);
    refused_tensor(4, &[1], &[1]);
    refused_tensor(0, &[2, 2], &[3, 1]);
    refused_tensor(-1, &[1], &[1]);
    refused_tensor(0, &[-1], &[1]);
    refused_tensor(0, &[2], &[-1]);
    refused_tensor(0, &[1, 1], &[1]);
    refused_tensor(i64::MAX, &[1], &[1]);
    refused_tensor(i64::MAX, &[0], &[1]);
    refused_tensor(0, &[2], &[i64::MAX]);
    refused_tensor(0, &[i64::MAX, i64::MAX], &[0, 0]);
    refused_tensor(0, &[i64::MAX, 2], &[i64::MAX, i64::MAX]);
    // Elements of eight bytes, of which there are two.
    let wide = tensor(storage("DoubleStorage", "0", 4), 0, &[4], &[1]);
    refused(&state_dict(&[text("a"), wide]), &["storage `0` that is missing or of another size"]);
    for (key, count) in [("1", 4), ("0", 3), ("0", 5), ("../0", 4), ("0", i64::MAX), ("", 4)] {
        let item = tensor(storage("FloatStorage", key, count), 0, &[1], &[1]);
        refused(&state_dict(&[text("a"), item]), &["tensor `a` has a storage", "missing or of another size"]);
    }
    let negative = tensor(storage("FloatStorage", "0", -4), 0, &[1], &[1]);
    refused(&state_dict(&[text("a"), negative]), &["damaged"]);
}

#[test]
fn what_is_no_state_dict_is_refused() {
    let item = || tensor(storage("FloatStorage", "0", 4), 0, &[4], &[1]);
    refused(b"\x80\x02].", &["no state_dict"]);
    refused(&[item(), b".".to_vec()].concat(), &["no state_dict"]);
    refused(&state_dict(&[integer(1), item()]), &["without a name"]);
    refused(&state_dict(&[text("epoch"), integer(3)]), &["`epoch`, which is no tensor", "save_pretrained"]);
    refused(&state_dict(&[text("model"), b"}".to_vec()]), &["`model`, which is no tensor"]);
    refused(&state_dict(&[text("a"), item(), text("a"), item()]), &["tensor `a` twice"]);
    refused(&state_dict(&[text("a\x1b[2J"), integer(3)]), &["`a\u{fffd}[2J`"]);
    refused(&state_dict(&[text(&"n".repeat(5000)), integer(3)]), &["nnn...`"]);
    // A parameter of what is no tensor, a tensor of what is no storage, persistent ids of other things.
    let parameter =
        call(global("torch._utils", "_rebuild_parameter"), &[integer(1), b"\x88".to_vec(), b"N".to_vec()]);
    refused(&state_dict(&[text("a"), parameter]), &["damaged"]);
    refused(&state_dict(&[text("a"), tensor(integer(1), 0, &[1], &[1])]), &["damaged"]);
    refused(b"N.", &["no state_dict"]);
    let module =
        tuple(&[text("module"), global("torch", "FloatStorage"), text("0"), text("cpu"), integer(4)]);
    refused(&[module, b"Q.".to_vec()].concat(), &["refers to something other than a storage", REFUSED]);
    let view = [
        text("storage"),
        global("torch", "FloatStorage"),
        text("0"),
        text("cpu"),
        integer(4),
        integers(&[1]),
    ];
    refused(&[tuple(&view), b"Q.".to_vec()].concat(), &["refers to a view of a storage", REFUSED]);
}

#[test]
fn pickles_that_are_cut_off_or_make_no_sense_are_refused() {
    for bytes in [
        &b""[..],
        b"\x80",
        b"\x80\x02",
        b".",
        b"t.",
        b"(.",
        b"N(.",
        b"\x85.",
        b"N(\x85.",
        b"h\x00.",
        b"Nq",
        b"j\xff\xff\xff\xff.",
        b"X\xff\xff\xff\xffabc",
        b"X\x02\0\0\0\xff\xfe.",
        b"\x8a\xff.",
        b"\x8a\x09aaaaaaaaa.",
        b"}(Nu.",
        b"}NNs",
        b"cos",
        b"R.",
        b"NR.",
        b"a.",
        b"Q.",
        b"NQ.",
        b"b.",
    ] {
        refused(bytes, &["damaged or cut off at its byte", "download or save it again"]);
    }
    refused(b"N(e.", &["appends to what is no list", REFUSED]);
    refused(b"N(u.", &["sets items of what is no dictionary", REFUSED]);
}

#[test]
fn depth_and_repetition_cost_neither_stack_nor_memory() {
    // A million tuples in each other; a list in itself; a list that is in a list twice, and so on, 2^40 items in all.
    refused(&[&b")"[..], &[0x85; 1_000_000], b"."].concat(), &["no state_dict"]);
    refused(b"]q\x00h\x00a.", &["no state_dict"]);
    let doubled = [b"]q\x00".to_vec(), b"](h\x00h\x00eq\x00".repeat(40), b".".to_vec()].concat();
    refused(&doubled, &["no state_dict"]);
    refused(&[b'N'; 1 << 20], &["more than 1048576 operations"]);
    refused(&[b'('; 1 << 20], &["more than 1048576 operations"]);
    // One long tuple as the shape of many tensors.
    let long = [text("a"), tensor(storage("FloatStorage", "0", 4), 0, &[1; 9], &[1; 9])];
    refused(&state_dict(&long), &["a tensor of more than 8 dimensions", REFUSED]);
    refused(&vec![b' '; (16 << 20) + 1], &["data.pkl of more than 16777216 bytes"]);
}

#[test]
fn a_tensor_that_repeats_its_elements_takes_no_memory_before_it_is_read() {
    let item = tensor(storage("FloatStorage", "0", 4), 0, &[1 << 40, 4], &[0, 1]);
    let folder = folder(&[("pytorch_model.bin", &saved(&state_dict(&[text("a"), item]), &[0; 16]))]);
    let weights = Weights::open(folder.path()).unwrap();
    assert_eq!(weights.get("a").unwrap().count(), 4 << 40);
}
