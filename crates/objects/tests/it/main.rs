//! Promises of the places.

mod places;
