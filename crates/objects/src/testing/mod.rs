//! What tests need: what every place must do, and a place that misbehaves.

pub mod conformance;
mod faulty;

pub use faulty::{Fault, Faulty, Rates};
