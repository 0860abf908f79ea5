//! `rempart repo key`: what opens a repository.

use super::access::{Access, Secret, ask_new, describe, first_line, no_new_key, now};
use super::points::open_log;
use crate::Output;
use clap::{Args, Subcommand};
use rempart_api::Error;
use rempart_repository::{
    KeyFile, KeyId, PassphraseCost, Repository, WrappedBy, WrappedKey, WrappedKeyId, WriterName,
};
use serde_json::json;
use std::path::{Path, PathBuf};

#[derive(Debug, Subcommand)]
pub enum KeyCommand {
    /// The keys that open it.
    List(Access),
    /// Let one more passphrase or key file open it, or a machine add restore points of its own.
    Add(Add),
    /// Let a passphrase or key file open it no more, or a machine add nothing more.
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
    /// Make a key that only adds restore points, for `rempart agent` on a machine that is not trusted with what the
    /// repository holds: it opens nothing, not even what it added, and forgets and removes nothing.
    #[arg(long, requires_all = ["name", "new_key_file"], conflicts_with_all = ["new_passphrase_file", "label"])]
    write_only: bool,
    /// The machine that a key only adds for: its restore points go by this name, and by no other.
    #[arg(long, requires = "write_only")]
    name: Option<String>,
}

/// Lets a passphrase or key file open a repository no more, or a machine's key add nothing more. The last one that opens it
/// stays. Whoever has a copy of the removed key, and what opens it, can still read: what is encrypted does not change.
#[derive(Debug, Args)]
pub struct Remove {
    #[command(flatten)]
    access: Access,
    /// By its id: `rempart repo key list`.
    key: String,
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
    let what = format!("cannot list the keys of `{}`", access.name());
    let repository = access.open()?;
    let keys = rempart_repository::keys(&**repository.objects()).map_err(|e| describe(&what, &e))?;
    let log = open_log(&repository)?;
    let writers = repository.writers(log.state()).map_err(|e| describe(&what, &e))?;
    let name = |name: &Option<WriterName>| name.as_ref().map(|name| name.as_str().to_owned());
    if output.json {
        let keys = keys.iter().map(|key| {
            json!({
                "key": key.id.to_string(), "by": by(key), "label": key.label, "created_unix_ms": key.created.0,
                "write_only": false, "removal_begun": log.state().key_is_removed(key.id),
            })
        });
        let writers = writers
            .iter()
            .map(|(id, whose)| json!({ "key": id.to_string(), "name": name(whose), "write_only": true }));
        return output.print_json(&keys.chain(writers).collect::<Vec<_>>());
    }
    let keys = keys.iter().map(|key| {
        // Whoever removed it was ended in between.
        let ends = if log.state().key_is_removed(key.id) {
            " until `rempart repo key remove` is run again"
        } else {
            ""
        };
        vec![key.id.to_string(), format!("opens, by {}{ends}", by(key)), key.label.clone()]
    });
    let writers = writers.iter().map(|(id, whose)| {
        let whose = name(whose).map_or("its name is lost".to_owned(), |name| format!("for {name}"));
        vec![id.to_string(), "only adds".to_owned(), whose]
    });
    output.table(&["key", "what", "label"], keys.chain(writers).collect())
}

fn add(command: &Add, output: Output) -> Result<(), Error> {
    let what = format!("cannot add a key to `{}`", command.access.name());
    let repository = command.access.open()?;
    if let (Some(name), Some(path)) = (&command.name, &command.new_key_file) {
        return add_writer(&repository, name, path, &what, output);
    }
    let secret = match (&command.new_key_file, &command.new_passphrase_file) {
        (Some(path), _) => {
            let file = KeyFile::random();
            // Before anything that only it opens.
            file.create(path, &repository.id()).map_err(|e| no_new_key(&what, "opens the repository", &e))?;
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

fn add_writer(
    repository: &Repository,
    name: &str,
    path: &Path,
    what: &str,
    output: Output,
) -> Result<(), Error> {
    let name = WriterName::new(name).ok_or_else(|| {
        Error::invalid(format!("`{name}` cannot be the name of a machine with a key of its own"))
            .hint("up to 64 bytes without spaces, `/` and `@`, not beginning with `.` or `-`")
    })?;
    let log = open_log(repository)?;
    let own = repository.writer().domain().id();
    let chain = repository.chain(name.as_str());
    if log.state().roots().values().any(|record| record.domain == own && record.chain == chain) {
        // Whoever stole the key could else pass newer points off as those of that machine.
        return Err(Error::refused(what)
            .cause(format!(
                "there are restore points of `{}` that were made without such a key",
                name.as_str()
            ))
            .hint("choose another name, or forget them"));
    }
    let key = repository.new_writer(name).map_err(|e| describe(what, &e))?;
    // Before anything says that it may write.
    key.create(path).map_err(|e| no_new_key(what, "`rempart repo key list` has", &e))?;
    repository.add_writer(&key, now()).map_err(|e| describe(what, &e))?;
    let id = key.signer().id();
    if output.json {
        return output.print_json(&json!({ "key": id.to_string() }));
    }
    output.tell(&format!("key {id} adds restore points, and does nothing else: `{}`", path.display()));
    Ok(())
}

fn remove(command: &Remove, output: Output) -> Result<(), Error> {
    let repository = command.access.open()?;
    let what = format!("cannot remove key {} of `{}`", command.key, command.access.name());
    let log = open_log(&repository)?;
    let writer = command.key.parse::<KeyId>().ok();
    let writer = writer.filter(|id| log.state().keys().any(|key| key.public.id() == *id));
    let removed = match (writer, command.key.parse::<WrappedKeyId>()) {
        (Some(id), _) => repository.remove_writer(id, now()),
        (None, Ok(id)) => repository.remove_key(id, now()),
        (None, Err(e)) => return Err(Error::invalid(&what).cause(e)),
    };
    removed.map_err(|e| describe(&what, &e))?;
    if output.json {
        return output.print_json(&json!({ "key": command.key }));
    }
    let verb = if writer.is_some() { "adds nothing to" } else { "does not open" };
    output.tell(&format!("key {} {verb} `{}` any more", command.key, command.access.name()));
    Ok(())
}
