//! Promises of the places.

mod atomic;
mod bad_days;
mod http;
mod places;
mod servers;
