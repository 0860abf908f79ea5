//! `rempart repo key`: what opens a repository.

use super::access::{Access, Secret, ask_new, describe, first_line, now};
use crate::Output;
use clap::{Args, Subcommand};
use rempart_api::Error;
use rempart_repository::{KeyFile, PassphraseCost, WrappedBy, WrappedKey, WrappedKeyId};
use serde_json::json;
use std::path::PathBuf;

#[derive(Debug, Subcommand)]
pub enum KeyCommand {
    /// The keys that open it.
    List(Access),
    /// Let one more passphrase or key file open it.
    Add(Add),
    /// Let a passphrase or key file open it no more.
    Remove(Remove),
}

/// Lets one more passphrase or key file open a repository. Without an option the new passphrase is asked for.
#[derive(Debug, Args)]
pub struct Add {
    #[command(flatten)]
    access: Access,
    /// Make a new key file there.
    #[arg(long, value_name = "FILE")]
    new_key_file: Option<PathBuf>,
    /// A file whose first line is the new passphrase.
    #[arg(long, value_name = "FILE", conflicts_with = "new_key_file")]
    new_passphrase_file: Option<PathBuf>,
    /// Whose it is, or where it lies: for people, and to be read by everybody who reads the place.
    #[arg(long, default_value = "", hide_default_value = true)]
    label: String,
}

/// Lets a passphrase or key file open a repository no more. The last one stays. Whoever has a copy of the removed key, and
/// what opens it, can still read: what is encrypted does not change.
#[derive(Debug, Args)]
pub struct Remove {
    #[command(flatten)]
    access: Access,
    /// By its id: `rempart repo key list`.
    key: WrappedKeyId,
}

pub fn run(command: &KeyCommand, output: Output) -> Result<(), Error> {
    match command {
        KeyCommand::List(access) => list(access, output),
        KeyCommand::Add(command) => add(command, output),
        KeyCommand::Remove(command) => remove(command, output),
    }
}

fn by(key: &WrappedKey) -> &'static str {
    match key.by {
        WrappedBy::Passphrase(_) => "passphrase",
        WrappedBy::KeyFile => "key file",
    }
}

fn list(access: &Access, output: Output) -> Result<(), Error> {
    let keys = rempart_repository::keys(&*access.place()?);
    let keys = keys.map_err(|e| describe(&format!("cannot list the keys of `{}`", access.name()), &e))?;
    if output.json {
        let keys = keys.iter().map(|key| {
            json!({ "key": key.id.to_string(), "by": by(key), "label": key.label, "created_unix_ms": key.created.0 })
        });
        return output.print_json(&keys.collect::<Vec<_>>());
    }
    let rows = keys.iter().map(|key| vec![key.id.to_string(), by(key).to_owned(), key.label.clone()]);
    output.table(&["key", "opened by", "label"], rows.collect())
}

fn add(command: &Add, output: Output) -> Result<(), Error> {
    let what = format!("cannot add a key to `{}`", command.access.name());
    let repository = command.access.open()?;
    let secret = match (&command.new_key_file, &command.new_passphrase_file) {
        (Some(path), _) => {
            let file = KeyFile::random();
            // Before anything that only it opens.
            file.create(path, &repository.id()).map_err(|e| describe(&what, &e))?;
            Secret::KeyFile(file)
        }
        (None, Some(path)) => Secret::Passphrase(first_line(path)?),
        (None, None) => Secret::Passphrase(ask_new()?),
    };
    let added = repository.add_key(secret.unlock(), PassphraseCost::DEFAULT, &command.label, now());
    let id = added.map_err(|e| describe(&what, &e))?;
    if output.json {
        return output.print_json(&json!({ "key": id.to_string() }));
    }
    output.tell(&format!("key {id} opens `{}`, too", command.access.name()));
    Ok(())
}

fn remove(command: &Remove, output: Output) -> Result<(), Error> {
    let repository = command.access.open()?;
    let what = format!("cannot remove key {} of `{}`", command.key, command.access.name());
    repository.remove_key(command.key).map_err(|e| describe(&what, &e))?;
    if output.json {
        return output.print_json(&json!({ "key": command.key.to_string() }));
    }
    output.tell(&format!("key {} opens `{}` no more", command.key, command.access.name()));
    Ok(())
}
