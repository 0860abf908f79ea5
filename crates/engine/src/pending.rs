//! Names that `store` and `cluster` are about to export; replaced by theirs.

use serde::{Deserialize, Serialize};

#[derive(Debug)]
pub struct IoCommand;
#[derive(Debug)]
pub struct IoCompletion;
pub trait Disk {}
#[derive(Debug, thiserror::Error)]
#[error("pending")]
pub struct StoreOpenError;
#[derive(Debug)]
pub struct RegisterRequest;
#[derive(Debug)]
pub struct RegisterReply;
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message;
#[derive(Debug, Clone)]
pub struct Config;
