//! Models from the Hub, against a server of this test that behaves like it: what is loaded and where it lands, what
//! happens where the network, the server or the cache are not as they should be, and that Python's library agrees.

mod fetching;
#[path = "../common/interpreter.rs"]
mod interpreter;
mod python;
mod refusals;
mod server;
mod setting;
