//! The globals that a `state_dict` is made of, and what they stand for. The list is closed.

use tch::Kind;

use super::pickle::{Stop, Value, ValueId, Values, global_name, refused};
use super::stored_tensor::ElementType;

/// The most dimensions of a tensor. Encoders have matrices.
const MOST_DIMENSIONS: usize = 8;

/// A global of Python.
#[derive(Clone, Debug)]
pub(super) enum Global {
    /// `collections.OrderedDict`
    OrderedDict,
    /// `torch._utils._rebuild_tensor` and `_rebuild_tensor_v2`, which differ in further arguments that say nothing about
    /// the values.
    RebuildTensor,
    /// `torch._utils._rebuild_parameter`
    RebuildParameter,
    /// The class of a storage, such as `torch.FloatStorage`.
    StorageClass(ElementType),
}

/// The elements behind one or several tensors.
#[derive(Clone, Debug)]
pub(super) struct Storage<'a> {
    /// What they are.
    pub element: ElementType,
    /// Where in the file they are, by name.
    pub key: &'a str,
    /// How many they are.
    pub count: u64,
}

/// A tensor as a view of a storage.
#[derive(Clone, Debug)]
pub(super) struct RebuiltTensor {
    /// Its storage.
    pub storage: ValueId,
    /// The first element.
    pub offset: i64,
    /// Its shape.
    pub shape: Vec<i64>,
    /// From an element to the next along each dimension.
    pub strides: Vec<i64>,
}

impl Global {
    /// Looks a global up.
    pub fn find(module: &str, name: &str) -> Result<Self, Stop> {
        let class =
            |width, kind| Ok(Global::StorageClass(ElementType { name: name.to_owned(), width, kind }));
        match (module, name) {
            ("collections", "OrderedDict") => Ok(Global::OrderedDict),
            ("torch._utils", "_rebuild_tensor" | "_rebuild_tensor_v2") => Ok(Global::RebuildTensor),
            ("torch._utils", "_rebuild_parameter") => Ok(Global::RebuildParameter),
            ("torch", "FloatStorage") => class(4, Some(Kind::Float)),
            ("torch", "HalfStorage") => class(2, Some(Kind::Half)),
            ("torch", "BFloat16Storage") => class(2, Some(Kind::BFloat16)),
            ("torch", "DoubleStorage") => class(8, Some(Kind::Double)),
            ("torch", "LongStorage") => class(8, None),
            ("torch", "IntStorage") => class(4, None),
            ("torch", "ShortStorage") => class(2, None),
            ("torch", "CharStorage" | "ByteStorage" | "BoolStorage") => class(1, None),
            _ => refused(format!("asks for {}", global_name(module, name))),
        }
    }

    /// Returns what a call of the global makes: a new value, or one that is there already.
    pub fn call<'a>(
        self,
        values: &Values<'a>,
        arguments: ValueId,
    ) -> Result<Result<Value<'a>, ValueId>, Stop> {
        let arguments = values.tuple(arguments).ok_or(Stop::Damaged)?;
        match self {
            Global::OrderedDict if arguments.is_empty() => {
                Ok(Ok(Value::Dictionary { ordered: true, entries: Vec::new() }))
            }
            Global::OrderedDict => refused("calls `OrderedDict` with arguments"),
            Global::RebuildTensor => {
                let &[storage, offset, shape, strides, ..] = arguments else { return Err(Stop::Damaged) };
                let is_storage = matches!(values.get(storage), Value::Storage(_));
                let offset = values.integer(offset).filter(|_| is_storage).ok_or(Stop::Damaged)?;
                let (shape, strides) = (integers(values, shape)?, integers(values, strides)?);
                Ok(Ok(Value::Tensor(RebuiltTensor { storage, offset, shape, strides })))
            }
            Global::RebuildParameter => match arguments.first() {
                Some(&data) if matches!(values.get(data), Value::Tensor(_)) => Ok(Err(data)),
                _ => Err(Stop::Damaged),
            },
            Global::StorageClass(element) => refused(format!("calls `torch.{}`", element.name)),
        }
    }
}

impl<'a> Storage<'a> {
    /// Reads the description that torch puts in the place of a storage: the word `storage`, its class, its name in the
    /// file, a device, the number of elements, and in files before torch 1.6 a view of another storage, which no version
    /// still writes.
    pub fn of(values: &Values<'a>, description: ValueId) -> Result<Self, Stop> {
        let parts = values.tuple(description).ok_or(Stop::Damaged)?;
        let (&[word, class, key, _, count], view) = match parts.split_first_chunk() {
            Some((first, view @ ([] | [_]))) => (first, view),
            _ => return refused("refers to something other than a storage"),
        };
        let (Value::Text("storage"), Value::Global(Global::StorageClass(element)), Value::Text(key)) =
            (values.get(word), values.get(class), values.get(key))
        else {
            return refused("refers to something other than a storage");
        };
        if view.iter().any(|&view| !matches!(values.get(view), Value::None)) {
            return refused("refers to a view of a storage");
        }
        let count = values.integer(count).and_then(|count| u64::try_from(count).ok());
        Ok(Self { element: element.clone(), key, count: count.ok_or(Stop::Damaged)? })
    }

    /// Returns the number of bytes.
    pub fn size(&self) -> Option<u64> {
        self.count.checked_mul(self.element.width)
    }
}

fn integers(values: &Values, id: ValueId) -> Result<Vec<i64>, Stop> {
    let parts = values.tuple(id).ok_or(Stop::Damaged)?;
    if parts.len() > MOST_DIMENSIONS {
        return refused(format!("makes a tensor of more than {MOST_DIMENSIONS} dimensions"));
    }
    parts.iter().map(|&part| values.integer(part).ok_or(Stop::Damaged)).collect()
}
