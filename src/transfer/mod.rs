//! Files over HTTP: resumed where they were cut off, tried again where that can help, and used only if their hash is the
//! published one. What is loaded from where is the business of [`data`](crate::data) and [`hub`](crate::hub).

mod checksum;
mod file;
mod http;
mod patience;

pub use checksum::Checksum;
pub(crate) use file::{Transfer, write_fault};
pub(crate) use http::{Advice, Fault, agent, connection_fault, header, number, status_fault};
pub use patience::{Patience, TransferEvent};
