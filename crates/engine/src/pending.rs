//! Names that `store` is about to export; replaced by its own.

#[derive(Debug)]
pub struct IoCommand;
#[derive(Debug)]
pub struct IoCompletion;
pub trait Disk {}
#[derive(Debug, thiserror::Error)]
#[error("pending")]
pub struct StoreOpenError;
