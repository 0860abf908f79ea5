//! Promises of the places.

mod atomic;
mod bad_days;
mod http;
mod lab;
mod places;
mod servers;
