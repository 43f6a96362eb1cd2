//! Pickles, read as data.
//!
//! A pickle is a program for a small stack machine, and Python's own machine calls whatever function a pickle names. This
//! one knows only the operations that a table of tensors is made of; what it would have to call is a closed list
//! ([`super::torch_globals`]) of which nothing is code, only a new value. All else is refused by name. Values lie side by
//! side and refer to each other by number, so nothing recurses, and the number of operations bounds the memory.

use std::collections::HashMap;

use super::bytes::Bytes;
use super::torch_globals::{Global, RebuiltTensor, Storage};
use crate::spelling::quoted;

/// The most operations of a pickle. A tensor takes some thirty.
const MOST_OPERATIONS: usize = 1 << 20;

/// The number of a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ValueId(u32);

/// A value of Python, as far as it matters here.
#[derive(Debug)]
pub(super) enum Value<'a> {
    None,
    Bool(bool),
    Integer(i64),
    /// A number that nothing asks for.
    Float,
    Text(&'a str),
    Tuple(Vec<ValueId>),
    List(Vec<ValueId>),
    /// With its entries in order, and whether it is an `OrderedDict`.
    Dictionary {
        ordered: bool,
        entries: Vec<(ValueId, ValueId)>,
    },
    Global(Global),
    Storage(Storage<'a>),
    Tensor(RebuiltTensor),
}

/// What a pickle holds.
#[derive(Debug)]
pub(super) struct Pickle<'a> {
    values: Vec<Value<'a>>,
    root: ValueId,
    /// Number of bytes up to its end.
    pub length: usize,
}

impl<'a> Pickle<'a> {
    /// Reads the pickle at the beginning of some bytes.
    ///
    /// # Errors
    /// Says, as a fragment to follow a file's name, what operation or global is refused, or where the pickle is damaged.
    pub fn read(bytes: &'a [u8]) -> Result<Self, String> {
        let machine = Machine {
            bytes: Bytes::new(bytes),
            values: Values(Vec::new()),
            stack: Vec::new(),
            marks: Vec::new(),
            memo: HashMap::new(),
        };
        machine.run()
    }

    /// Returns the whole.
    pub fn root(&self) -> &Value<'a> {
        self.get(self.root)
    }

    /// Returns a value that another one refers to.
    pub fn get(&self, id: ValueId) -> &Value<'a> {
        &self.values[id.0 as usize]
    }

    /// Iterates over all storages, whoever refers to them.
    pub fn storages(&self) -> impl Iterator<Item = &Storage<'a>> {
        self.values.iter().filter_map(|value| match value {
            Value::Storage(storage) => Some(storage),
            _ => None,
        })
    }
}

/// The values made so far.
pub(super) struct Values<'a>(Vec<Value<'a>>);

impl<'a> Values<'a> {
    /// Returns a value.
    pub fn get(&self, id: ValueId) -> &Value<'a> {
        &self.0[id.0 as usize]
    }

    /// Returns the parts of a tuple.
    pub fn tuple(&self, id: ValueId) -> Option<&[ValueId]> {
        match self.get(id) {
            Value::Tuple(parts) => Some(parts),
            _ => None,
        }
    }

    /// Returns an integer.
    pub fn integer(&self, id: ValueId) -> Option<i64> {
        match self.get(id) {
            Value::Integer(number) => Some(*number),
            _ => None,
        }
    }
}

/// What stops a pickle: bytes that end, or numbers and operations that make no sense; or what is refused.
pub(super) enum Stop {
    Damaged,
    Refused(String),
}

/// Makes the refusal of what a pickle asks for.
pub(super) fn refused<T>(what: impl Into<String>) -> Result<T, Stop> {
    Err(Stop::Refused(what.into()))
}

struct Machine<'a> {
    bytes: Bytes<'a>,
    values: Values<'a>,
    stack: Vec<ValueId>,
    /// The height of the stack at each mark.
    marks: Vec<usize>,
    memo: HashMap<u32, ValueId>,
}

impl<'a> Machine<'a> {
    fn run(mut self) -> Result<Pickle<'a>, String> {
        for _ in 0..MOST_OPERATIONS {
            let position = self.bytes.position();
            match self.step() {
                Ok(None) => {}
                Ok(Some(root)) => {
                    return Ok(Pickle { values: self.values.0, root, length: self.bytes.position() });
                }
                Err(Stop::Damaged) => {
                    return Err(format!(
                        "has a pickle that is damaged or cut off at its byte {position}; download or save it again"
                    ));
                }
                Err(Stop::Refused(what)) => {
                    return Err(format!(
                        "has a pickle that {what}, which no tensors need; it was refused, and nothing of it was \
                         executed. Get the weights from a source that you trust, best as model.safetensors"
                    ));
                }
            }
        }
        Err(format!("has a pickle of more than {MOST_OPERATIONS} operations; it does not hold weights alone"))
    }

    /// Does the next operation. Returns the whole at the end.
    fn step(&mut self) -> Result<Option<ValueId>, Stop> {
        let operation = self.bytes.u8().ok_or(Stop::Damaged)?;
        match operation {
            // PROTO; the protocols differ in which operations occur.
            0x80 => {
                self.bytes.u8().ok_or(Stop::Damaged)?;
            }
            // STOP
            b'.' => return self.pop().map(Some),
            // MARK
            b'(' => self.marks.push(self.stack.len()),
            // NONE, NEWTRUE, NEWFALSE
            b'N' => self.push(Value::None),
            0x88 => self.push(Value::Bool(true)),
            0x89 => self.push(Value::Bool(false)),
            // BININT, BININT1, BININT2, LONG1, BINFLOAT
            b'J' => {
                let number = self.bytes.u32().ok_or(Stop::Damaged)?;
                self.push(Value::Integer(i64::from(number.cast_signed())));
            }
            b'K' => {
                let number = self.bytes.u8().ok_or(Stop::Damaged)?;
                self.push(Value::Integer(i64::from(number)));
            }
            b'M' => {
                let number = self.bytes.u16().ok_or(Stop::Damaged)?;
                self.push(Value::Integer(i64::from(number)));
            }
            0x8a => {
                let number = self.long().ok_or(Stop::Damaged)?;
                self.push(Value::Integer(number));
            }
            b'G' => {
                self.bytes.u64().ok_or(Stop::Damaged)?;
                self.push(Value::Float);
            }
            // BINUNICODE, and the BINSTRING and SHORT_BINSTRING of Python 2
            b'X' | b'T' => {
                let length = self.bytes.u32().ok_or(Stop::Damaged)?;
                self.text(length as usize)?;
            }
            b'U' => {
                let length = self.bytes.u8().ok_or(Stop::Damaged)?;
                self.text(usize::from(length))?;
            }
            // EMPTY_TUPLE, TUPLE1, TUPLE2, TUPLE3, TUPLE
            b')' => self.push(Value::Tuple(Vec::new())),
            0x85..=0x87 => {
                let count = usize::from(operation - 0x84);
                let bottom = self.bottom();
                let start = self.stack.len().checked_sub(count).filter(|&start| start >= bottom);
                let parts = self.stack.split_off(start.ok_or(Stop::Damaged)?);
                self.push(Value::Tuple(parts));
            }
            b't' => {
                let parts = self.pop_to_mark()?;
                self.push(Value::Tuple(parts));
            }
            // EMPTY_LIST, APPEND, APPENDS
            b']' => self.push(Value::List(Vec::new())),
            b'a' => {
                let item = self.pop()?;
                self.append(vec![item])?;
            }
            b'e' => {
                let items = self.pop_to_mark()?;
                self.append(items)?;
            }
            // EMPTY_DICT, SETITEM, SETITEMS
            b'}' => self.push(Value::Dictionary { ordered: false, entries: Vec::new() }),
            b's' => {
                let value = self.pop()?;
                let key = self.pop()?;
                self.set(vec![key, value])?;
            }
            b'u' => {
                let items = self.pop_to_mark()?;
                self.set(items)?;
            }
            // BINPUT, LONG_BINPUT, BINGET, LONG_BINGET
            b'q' | b'r' => {
                let place = self.memo_place(operation == b'r')?;
                let top = self.top()?;
                self.memo.insert(place, top);
            }
            b'h' | b'j' => {
                let place = self.memo_place(operation == b'j')?;
                let value = *self.memo.get(&place).ok_or(Stop::Damaged)?;
                self.stack.push(value);
            }
            // GLOBAL
            b'c' => {
                let mut line = || std::str::from_utf8(self.bytes.line()?).ok();
                let (module, name) = line().zip(line()).ok_or(Stop::Damaged)?;
                let global = Global::find(module, name)?;
                self.push(Value::Global(global));
            }
            // REDUCE
            b'R' => {
                let arguments = self.pop()?;
                let function = self.pop()?;
                let Value::Global(global) = self.values.get(function) else {
                    return refused("calls what is no function");
                };
                let result = global.clone().call(&self.values, arguments)?;
                match result {
                    Ok(value) => self.push(value),
                    Err(known) => self.stack.push(known),
                }
            }
            // BUILD
            b'b' => self.build()?,
            // BINPERSID
            b'Q' => {
                let id = self.pop()?;
                let storage = Storage::of(&self.values, id)?;
                self.push(Value::Storage(storage));
            }
            other => return refused(format!("uses the operation {}", operation_name(other))),
        }
        Ok(None)
    }

    /// The height of the stack below which lies what belongs to others.
    fn bottom(&self) -> usize {
        self.marks.last().copied().unwrap_or(0)
    }

    fn push(&mut self, value: Value<'a>) {
        // No more values than operations, so their numbers fit.
        self.stack.push(ValueId(self.values.0.len() as u32));
        self.values.0.push(value);
    }

    fn pop(&mut self) -> Result<ValueId, Stop> {
        let top = self.top()?;
        self.stack.pop();
        Ok(top)
    }

    fn top(&self) -> Result<ValueId, Stop> {
        self.stack[self.bottom()..].last().copied().ok_or(Stop::Damaged)
    }

    fn pop_to_mark(&mut self) -> Result<Vec<ValueId>, Stop> {
        let mark = self.marks.pop().ok_or(Stop::Damaged)?;
        Ok(self.stack.split_off(mark))
    }

    /// Reads an integer of up to eight bytes.
    fn long(&mut self) -> Option<i64> {
        let count = self.bytes.u8()?;
        let bytes = self.bytes.take(usize::from(count))?;
        let negative = bytes.last().is_some_and(|&byte| byte >= 0x80);
        let mut padded = [if negative { 0xff } else { 0 }; 8];
        padded.get_mut(..bytes.len())?.copy_from_slice(bytes);
        Some(i64::from_le_bytes(padded))
    }

    fn text(&mut self, length: usize) -> Result<(), Stop> {
        let bytes = self.bytes.take(length).ok_or(Stop::Damaged)?;
        let text = std::str::from_utf8(bytes).map_err(|_| Stop::Damaged)?;
        self.push(Value::Text(text));
        Ok(())
    }

    fn memo_place(&mut self, long: bool) -> Result<u32, Stop> {
        let place = if long { self.bytes.u32() } else { self.bytes.u8().map(u32::from) };
        place.ok_or(Stop::Damaged)
    }

    /// Changes the value on top of the stack.
    fn top_value(&mut self) -> Result<&mut Value<'a>, Stop> {
        let top = self.top()?;
        Ok(&mut self.values.0[top.0 as usize])
    }

    fn append(&mut self, items: Vec<ValueId>) -> Result<(), Stop> {
        match self.top_value()? {
            Value::List(list) => list.extend(items),
            _ => return refused("appends to what is no list"),
        }
        Ok(())
    }

    fn set(&mut self, items: Vec<ValueId>) -> Result<(), Stop> {
        let (pairs, []) = items.as_chunks::<2>() else { return Err(Stop::Damaged) };
        match self.top_value()? {
            Value::Dictionary { entries, .. } => {
                entries.extend(pairs.iter().map(|&[key, value]| (key, value)))
            }
            _ => return refused("sets items of what is no dictionary"),
        }
        Ok(())
    }

    /// Drops the attributes of a dictionary: torch gives a `state_dict` the versions of its modules, `_metadata`.
    fn build(&mut self) -> Result<(), Stop> {
        let state = self.pop()?;
        let plain = matches!(self.values.get(state), Value::Dictionary { .. } | Value::None);
        match self.top_value()? {
            Value::Dictionary { ordered: true, .. } if plain => Ok(()),
            _ => refused("uses the operation BUILD on something other than the attributes of an OrderedDict"),
        }
    }
}

/// Returns the name in Python's `pickle` of an operation that is not done here.
fn operation_name(operation: u8) -> String {
    let name = match operation {
        b'0' => "POP",
        b'1' => "POP_MARK",
        b'2' => "DUP",
        b'i' => "INST",
        b'o' => "OBJ",
        b'P' => "PERSID",
        b'I' => "INT",
        b'L' => "LONG",
        b'F' => "FLOAT",
        b'S' => "STRING",
        b'V' => "UNICODE",
        b'l' => "LIST",
        b'd' => "DICT",
        b'p' => "PUT",
        b'g' => "GET",
        b'B' => "BINBYTES",
        b'C' => "SHORT_BINBYTES",
        0x81 => "NEWOBJ",
        0x82..=0x84 => "EXT",
        0x8b => "LONG4",
        0x8c => "SHORT_BINUNICODE",
        0x8d => "BINUNICODE8",
        0x8e => "BINBYTES8",
        0x8f => "EMPTY_SET",
        0x90 => "ADDITEMS",
        0x91 => "FROZENSET",
        0x92 => "NEWOBJ_EX",
        0x93 => "STACK_GLOBAL",
        0x94 => "MEMOIZE",
        0x95 => "FRAME",
        0x96 => "BYTEARRAY8",
        0x97 => "NEXT_BUFFER",
        0x98 => "READONLY_BUFFER",
        other => return format!("{other:#04x}"),
    };
    name.to_owned()
}

/// Returns a global as an error names it.
pub(super) fn global_name(module: &str, name: &str) -> String {
    quoted(&format!("{module}.{name}"))
}
