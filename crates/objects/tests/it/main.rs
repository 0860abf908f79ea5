//! Promises of the places.

mod bad_days;
mod http;
mod places;
mod servers;
