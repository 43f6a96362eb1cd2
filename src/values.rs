//! Values as they are written: kinds that YAML files share, checked where they are read so that an error knows its line;
//! spellings of settings and hashes.

use std::fmt;
use std::marker::PhantomData;

use serde::de::value::{MapAccessDeserializer, SeqAccessDeserializer};
use serde::de::{Deserializer, Error, IntoDeserializer, MapAccess, SeqAccess, Unexpected, Visitor};
use serde::{Deserialize, Serialize};

/// Returns the YAML spelling of a setting, such as `per_example`.
pub fn yaml_name<T: Serialize>(value: &T) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(text)) => text,
        // Two of them must not look alike: names are part of what tells runs apart.
        other => unreachable!("a setting has one word for a name, not {other:?}"),
    }
}

/// Writes bytes, such as a hash, as hexadecimal digits.
pub fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A number that JSON has no word for if it is not finite: null stands for it, and is read as NaN.
pub mod nan_as_null {
    use serde::{Deserialize, Deserializer, Serializer};

    /// Writes the number.
    ///
    /// # Errors
    /// Those of the format.
    pub fn serialize<S: Serializer>(value: &f64, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_f64(*value)
    }

    /// Reads the number.
    ///
    /// # Errors
    /// Those of the format.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
        Ok(Option::deserialize(deserializer)?.unwrap_or(f64::NAN))
    }
}

/// Reads a map whose keys are the user's, each at most once.
///
/// # Errors
/// Those of the format, and if a key is there twice or has a number that JSON has no word for.
pub fn keys_once<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<serde_json::Map<String, serde_json::Value>>, D::Error> {
    deserializer.deserialize_any(KeysOnce).map(Some)
}

struct KeysOnce;

impl<'de> Visitor<'de> for KeysOnce {
    type Value = serde_json::Map<String, serde_json::Value>;

    fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str("a map")
    }

    fn visit_unit<E: Error>(self) -> Result<Self::Value, E> {
        Ok(serde_json::Map::new())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Self::Value, A::Error> {
        let mut map = serde_json::Map::new();
        while let Some(key) = entries.next_key::<String>()? {
            if map.contains_key(&key) {
                return Err(A::Error::custom(format!("duplicate field `{key}`")));
            }
            let value: serde_yaml::Value = entries.next_value()?;
            if value.as_f64().is_some_and(|number| !number.is_finite()) {
                return Err(A::Error::custom(format!("{key}: expected a finite number")));
            }
            map.insert(key, serde_json::to_value(value).map_err(A::Error::custom)?);
        }
        Ok(map)
    }
}

/// One value, or a list of values that makes an axis of the grid.
#[derive(Clone, Debug, PartialEq)]
pub struct OneOrMany<T>(pub Vec<T>);

/// Returns the values of an axis of the grid: those that were typed, or the default alone.
pub fn axis<T: Clone>(typed: &Option<OneOrMany<T>>, default: T) -> Vec<T> {
    typed.as_ref().map_or_else(|| vec![default], |typed| typed.0.clone())
}

impl<T> From<T> for OneOrMany<T> {
    fn from(value: T) -> Self {
        Self(vec![value])
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for OneOrMany<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(OneOrManyVisitor(PhantomData))
    }
}

struct OneOrManyVisitor<T>(PhantomData<T>);

impl<'de, T: Deserialize<'de>> Visitor<'de> for OneOrManyVisitor<T> {
    type Value = OneOrMany<T>;

    fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str("a value or a list of values")
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<Self::Value, E> {
        T::deserialize(value.into_deserializer()).map(OneOrMany::from)
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Self::Value, E> {
        T::deserialize(value.into_deserializer()).map(OneOrMany::from)
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Self::Value, E> {
        T::deserialize(value.into_deserializer()).map(OneOrMany::from)
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Self::Value, E> {
        T::deserialize(value.into_deserializer()).map(OneOrMany::from)
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<Self::Value, E> {
        T::deserialize(value.into_deserializer()).map(OneOrMany::from)
    }

    fn visit_unit<E: Error>(self) -> Result<Self::Value, E> {
        T::deserialize(().into_deserializer()).map(OneOrMany::from)
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
        T::deserialize(MapAccessDeserializer::new(map)).map(OneOrMany::from)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, sequence: A) -> Result<Self::Value, A::Error> {
        let values = Vec::deserialize(SeqAccessDeserializer::new(sequence))?;
        if values.is_empty() { Err(A::Error::custom("the list is empty")) } else { Ok(OneOrMany(values)) }
    }
}

macro_rules! checked_number {
    ($(#[$about:meta])* $name:ident, $what:literal, $valid:expr) => {
        $(#[$about])*
        #[derive(Clone, Copy, Debug, PartialEq, PartialOrd, Serialize)]
        pub struct $name(pub f64);

        impl TryFrom<f64> for $name {
            type Error = String;

            fn try_from(value: f64) -> Result<Self, String> {
                let valid: fn(f64) -> bool = $valid;
                if valid(value) { Ok(Self(value)) } else { Err(format!(concat!("must be ", $what, ", not {}"), value)) }
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                deserializer.deserialize_f64(NumberVisitor { what: $what, check: Self::try_from, null: None })
            }
        }
    };
}

/// Reads and checks a number in one place, so that an error names the key that the number stands at.
struct NumberVisitor<T> {
    what: &'static str,
    check: fn(f64) -> Result<T, String>,
    /// What null stands for, where it may stand.
    null: Option<T>,
}

impl<T> Visitor<'_> for NumberVisitor<T> {
    type Value = T;

    fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str(self.what)
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<T, E> {
        (self.check)(value).map_err(E::custom)
    }

    fn visit_unit<E: Error>(mut self) -> Result<T, E> {
        self.null.take().ok_or_else(|| E::invalid_type(Unexpected::Unit, &self))
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<T, E> {
        self.visit_f64(value as f64)
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<T, E> {
        self.visit_f64(value as f64)
    }
}

checked_number!(
    /// The share of weights that train: above 0, at most 1.
    Share,
    "a number above 0 and at most 1",
    |value| value > 0.0 && value <= 1.0
);
checked_number!(
    /// A finite number above zero, such as a learning rate; in float32, too.
    Positive,
    "a number above 0 that float32 can hold",
    |value| value as f32 > 0.0 && (value as f32).is_finite()
);
checked_number!(
    /// A finite number of at least zero, such as a weight decay; finite in float32, too.
    NonNegative,
    "a number of at least 0 that float32 can hold",
    |value| value >= 0.0 && (value as f32).is_finite()
);

checked_number!(
    /// A share that may be nothing but not the whole: at least 0, below 1.
    PartialShare,
    "a number of at least 0 and below 1",
    |value| (0.0..1.0).contains(&value)
);

checked_number!(
    /// A share that is neither nothing nor the whole: above 0, below 1.
    ProperShare,
    "a number above 0 and below 1",
    |value| value > 0.0 && value < 1.0
);

/// A limit of at least 0, or null where there is none.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limit(pub Option<f64>);

impl<'de> Deserialize<'de> for Limit {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let check = |value| NonNegative::try_from(value).map(|limit| Limit(Some(limit.0)));
        let what = "a number of at least 0, or null";
        deserializer.deserialize_any(NumberVisitor { what, check, null: Some(Limit(None)) })
    }
}

/// Reads a key for which null is a value of its own, and not what is left out.
///
/// # Errors
/// Those of the value.
pub fn typed<'de, T: Deserialize<'de>, D: Deserializer<'de>>(deserializer: D) -> Result<Option<T>, D::Error> {
    T::deserialize(deserializer).map(Some)
}

/// A count of at least one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Count(pub usize);

impl TryFrom<u64> for Count {
    type Error = String;

    fn try_from(value: u64) -> Result<Self, String> {
        match usize::try_from(value) {
            Ok(value @ 1..) => Ok(Self(value)),
            _ => Err(format!("must be at least 1, not {value}")),
        }
    }
}

impl<'de> Deserialize<'de> for Count {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_u64(CountVisitor)
    }
}

struct CountVisitor;

impl Visitor<'_> for CountVisitor {
    type Value = Count;

    fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str("a whole number of at least 1")
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Count, E> {
        Count::try_from(value).map_err(E::custom)
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Count, E> {
        match u64::try_from(value) {
            Ok(value) => self.visit_u64(value),
            Err(_) => Err(E::custom(format!("must be at least 1, not {value}"))),
        }
    }
}

/// What a cell of a table is to hold: a text, number or truth value, as typed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cell(String);

impl Cell {
    /// Returns whether a cell of a file holds this: the same text, or the same number in other digits.
    pub fn is(&self, cell: &str) -> bool {
        let number = |text: &str| text.parse::<f64>().ok().filter(|number| number.is_finite());
        self.0 == cell || number(&self.0).is_some_and(|own| number(cell) == Some(own))
    }
}

impl fmt::Display for Cell {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for Cell {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(CellVisitor)
    }
}

struct CellVisitor;

impl Visitor<'_> for CellVisitor {
    type Value = Cell;

    fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str("a text, a number, true, false or null")
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<Cell, E> {
        Ok(Cell(value.to_owned()))
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<Cell, E> {
        Ok(Cell(value.to_string()))
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Cell, E> {
        Ok(Cell(value.to_string()))
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Cell, E> {
        Ok(Cell(value.to_string()))
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Cell, E> {
        Ok(Cell(value.to_string()))
    }

    /// Null is an empty cell.
    fn visit_unit<E: Error>(self) -> Result<Cell, E> {
        Ok(Cell(String::new()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cell_is_its_text_or_its_number() {
        let cell = |yaml: &str| serde_yaml::from_str::<Cell>(yaml).unwrap();
        for (yaml, same, other) in [
            ("1e-4", "0.0001", "0.001"),
            ("1", "1.0", "10"),
            ("'0.0001'", "1e-4", "0"),
            ("true", "true", "false"),
            ("vanilla", "vanilla", "Vanilla"),
            ("null", "", "null"),
        ] {
            assert!(cell(yaml).is(same) && !cell(yaml).is(other), "{yaml}");
        }
        assert!(!cell("12345678e1234567").is("99999999e9999999"), "run ids that look like huge numbers");
        assert!(serde_yaml::from_str::<Cell>("[1]").is_err());
    }
}
