//! The methods by name, and how YAML names them.

use std::fmt;
use std::sync::Arc;

use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};

use super::{Method, Preset, composed, vanilla};
use crate::error::Result;
use crate::spelling::suggestion;

/// A method's options as typed.
pub trait MethodOptions: fmt::Debug + Send + Sync {
    /// Settles the options: one method for each point of their grid.
    ///
    /// # Errors
    /// Fails, naming the method, if options contradict each other.
    fn resolve(&self, preset: Preset) -> Result<Vec<Arc<dyn Method>>>;
}

/// A method as typed: `vanilla`, `child_tuning_f: {p: 0.3}`, or several at once, `[child_tuning_d: {p: 0.3}, bitfit]`.
#[derive(Clone, Debug)]
pub struct MethodSpec(Arc<dyn MethodOptions>);

/// Each method is a module with an `Options` type, under the name it has in YAML.
macro_rules! registry {
    ($($method:ident),+ $(,)?) => {
        /// The names of all methods.
        pub const METHODS: &[&str] = &[$(stringify!($method)),+];

        fn with_defaults(name: &str) -> Option<MethodSpec> {
            match name {
                $(stringify!($method) => Some(MethodSpec(Arc::new(super::$method::Options::default()))),)+
                _ => None,
            }
        }

        fn with_options<'de, A: MapAccess<'de>>(name: &str, map: &mut A) -> Result<MethodSpec, A::Error> {
            match name {
                $(stringify!($method) => {
                    let options: Option<super::$method::Options> = map.next_value()?;
                    Ok(MethodSpec(Arc::new(options.unwrap_or_default())))
                })+
                _ => Err(unknown(name)),
            }
        }
    };
}

registry!(
    vanilla,
    child_tuning_f,
    child_tuning_d,
    fish_mask,
    sift,
    magnitude_mask,
    lt_sft,
    bitfit,
    top_layers,
    reinitialised_layers,
    layer_wise_rates,
    l2_sp,
    prior_weight_decay,
    recadam,
    r_drop,
    r3f,
    r4f,
    smart,
    hype,
    dps,
    mixout,
    lora,
);

impl MethodSpec {
    /// Returns plain fine-tuning, as if it had been typed.
    pub fn vanilla() -> Self {
        Self(Arc::new(vanilla::Options::default()))
    }

    /// Settles the options: one method for each point of their grid.
    ///
    /// # Errors
    /// Fails, naming the method, if options contradict each other.
    pub fn resolve(&self, preset: Preset) -> Result<Vec<Arc<dyn Method>>> {
        self.0.resolve(preset)
    }
}

impl<'de> Deserialize<'de> for MethodSpec {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(SpecVisitor)
    }
}

struct SpecVisitor;

impl<'de> Visitor<'de> for SpecVisitor {
    type Value = MethodSpec;

    fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        write!(formatter, "a method ({}), alone or with its options, or a list of them", METHODS.join(", "))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<MethodSpec, A::Error> {
        let mut parts = Vec::new();
        while let Some(part) = list.next_element_seed(Part)? {
            parts.push(part);
        }
        if parts.is_empty() {
            return Err(A::Error::custom("a list within `method` names no method"));
        }
        Ok(MethodSpec(Arc::new(composed::Options(parts))))
    }

    fn visit_str<E: serde::de::Error>(self, name: &str) -> Result<MethodSpec, E> {
        with_defaults(name).ok_or_else(|| unknown(name))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<MethodSpec, A::Error> {
        let name: String = map.next_key()?.ok_or_else(|| A::Error::custom("a method is missing"))?;
        let spec = with_options(&name, &mut map)?;
        match map.next_key::<String>()? {
            None => Ok(spec),
            Some(second) => Err(A::Error::custom(format!(
                "`{second}` stands in the entry of `{name}`; give each method its own `- ` and indent its options"
            ))),
        }
    }
}

/// A method of a list that is one method.
struct Part;

impl<'de> DeserializeSeed<'de> for Part {
    type Value = MethodSpec;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<MethodSpec, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Part {
    type Value = MethodSpec;

    fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str("a method; there is no list of methods within a composed method")
    }

    fn visit_str<E: serde::de::Error>(self, name: &str) -> Result<MethodSpec, E> {
        SpecVisitor.visit_str(name)
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<MethodSpec, A::Error> {
        SpecVisitor.visit_map(map)
    }
}

fn unknown<E: serde::de::Error>(name: &str) -> E {
    let known = METHODS.iter().copied();
    E::custom(format!("unknown method `{name}`{}; known are {}", suggestion(name, known), METHODS.join(", ")))
}
