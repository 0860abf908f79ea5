//! Which repository, and what opens it.

use crate::{Output, parse};
use clap::parser::ValueSource;
use clap::{ArgMatches, Args, FromArgMatches};
use rempart_api::Error;
use rempart_objects::Objects;
use rempart_repository::{
    AnyKey, ChunkSize, ErrorKind, KeyFile, NewRepository, PassphraseCost, Repository, RepositoryId, Unlock,
};
use rempart_types::WallTime;
use serde_json::json;
use std::io::{BufRead, IsTerminal, Write};
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The repository that a command works on.
#[derive(Debug, Args)]
pub struct Access {
    /// The repository: a directory, `s3://BUCKET/PREFIX` or `az://ACCOUNT/CONTAINER/PREFIX`.
    #[arg(long = "repo", env = "REMPART_REPOSITORY")]
    repo: String,
    #[command(flatten)]
    key: CommandLineFirst<KeyArgs>,
}

/// What opens a repository. Without either it is asked for on the terminal.
#[derive(Debug, Clone, Args)]
pub struct KeyArgs {
    /// A key file of the repository.
    #[arg(long, env = "REMPART_KEY_FILE")]
    pub key_file: Option<PathBuf>,
    /// A file whose first line is the passphrase.
    #[arg(long, env = "REMPART_PASSPHRASE_FILE")]
    pub passphrase_file: Option<PathBuf>,
    /// Where this machine keeps what it can make again of repositories.
    #[arg(long, env = "REMPART_CACHE_DIR", default_value = "/var/cache/rempart")]
    pub cache_dir: PathBuf,
    /// A file of lines such as `AWS_ACCESS_KEY_ID=…`, for a repository in a bucket; without it the environment tells.
    #[arg(long, env = "REMPART_CREDENTIALS_FILE", value_name = "FILE")]
    pub credentials: Option<PathBuf>,
}

impl KeyOptions for KeyArgs {
    const NAMES: [&str; 2] = ["key_file", "passphrase_file"];

    fn files(&mut self) -> [&mut Option<PathBuf>; 2] {
        [&mut self.key_file, &mut self.passphrase_file]
    }
}

/// Options for two files, of which one opens a repository.
pub trait KeyOptions: Args {
    /// Of the fields.
    const NAMES: [&str; 2];

    fn files(&mut self) -> [&mut Option<PathBuf>; 2];
}

/// Such options: where the command line names one of the files, what the environment says of the other counts for nothing.
#[derive(Debug, Clone)]
pub struct CommandLineFirst<T>(T);

impl<T> Deref for CommandLineFirst<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T: KeyOptions> Args for CommandLineFirst<T> {
    fn augment_args(command: clap::Command) -> clap::Command {
        T::augment_args(command)
    }

    fn augment_args_for_update(command: clap::Command) -> clap::Command {
        T::augment_args_for_update(command)
    }
}

impl<T: KeyOptions> FromArgMatches for CommandLineFirst<T> {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut options = T::from_arg_matches(matches)?;
        let on_command_line =
            T::NAMES.map(|name| matches.value_source(name) == Some(ValueSource::CommandLine));
        let [key_file, passphrase_file] = options.files();
        match on_command_line {
            [true, false] => *passphrase_file = None,
            [false, true] => *key_file = None,
            _ if key_file.is_none() || passphrase_file.is_none() => {}
            [is_given, _] => {
                let place = if is_given { "on the command line" } else { "in the environment" };
                let [key_file, passphrase_file] = T::NAMES.map(|name| name.replace('_', "-"));
                let why = format!(
                    "both --{key_file} and --{passphrase_file} are said {place}: one of them opens the repository\n"
                );
                return Err(clap::Error::raw(clap::error::ErrorKind::ArgumentConflict, why));
            }
        }
        Ok(CommandLineFirst(options))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

/// Makes a repository in an empty directory, bucket or container, or under a prefix of one.
///
/// A bucket is `s3://BUCKET/PREFIX`, a container of Azure `az://ACCOUNT/CONTAINER/PREFIX`; `?endpoint=https://HOST` and
/// `?region=REGION` say where, if not at Amazon's or Azure's.
#[derive(Debug, Args)]
pub struct Create {
    /// Where: a directory that does not exist yet, or is empty; or the URL of a bucket or container, which must exist.
    url: String,
    #[command(flatten)]
    key: CommandLineFirst<KeyArgs>,
    /// Make a new key file there and let it open the repository, instead of a passphrase.
    // What the environment opens other repositories by is no contradiction.
    #[arg(long)]
    new_key_file: Option<PathBuf>,
    /// A power of two from 64K to 1M: smaller chunks store less of a scattered change, larger ones are faster.
    #[arg(long, default_value = "128K", value_parser = parse::byte_count)]
    chunk_size: u64,
    /// Have the place keep every object against everybody for so long, such as `30d`: a bucket that was created with object
    /// lock. What a backup shares with earlier ones is kept for as long as the newest. Nobody can take this back, and until
    /// then nothing can be removed, nor its costs.
    #[arg(long, value_name = "DURATION", value_parser = parse::seconds)]
    immutable: Option<u64>,
}

pub enum Secret {
    Passphrase(String),
    KeyFile(KeyFile),
}

impl Secret {
    pub fn unlock(&self) -> Unlock<'_> {
        match self {
            Secret::Passphrase(passphrase) => Unlock::Passphrase(passphrase),
            Secret::KeyFile(file) => Unlock::KeyFile(file),
        }
    }
}

impl KeyArgs {
    fn secret(&self, is_new: bool) -> Result<Secret, Error> {
        if let Some(path) = &self.key_file {
            return match AnyKey::load(path).map_err(|e| describe("cannot use the key file", &e))? {
                AnyKey::Opens(key) => Ok(Secret::KeyFile(key)),
                AnyKey::Writes(_) => {
                    let message =
                        format!("the key `{}` adds restore points, and opens nothing", path.display());
                    Err(Error::new(rempart_api::ErrorKind::Forbidden, message)
                        .hint("`rempart agent backup` is what it is for"))
                }
            };
        }
        let passphrase = match &self.passphrase_file {
            Some(path) => first_line(path)?,
            None if is_new => ask_new()?,
            None => ask("passphrase: ")?,
        };
        Ok(Secret::Passphrase(passphrase))
    }
}

pub fn first_line(path: &Path) -> Result<String, Error> {
    let text = std::fs::read_to_string(path).map_err(|e| {
        Error::invalid(format!("cannot read the passphrase from `{}`", path.display())).cause(e)
    })?;
    Ok(text.lines().next().unwrap_or_default().to_owned())
}

/// Asks on the terminal for a passphrase that is not in use yet.
pub fn ask_new() -> Result<String, Error> {
    let passphrase = ask("new passphrase: ")?;
    match ask("the same once more: ")? == passphrase {
        true => Ok(passphrase),
        false => Err(Error::invalid("the two passphrases differ")),
    }
}

/// Asks on the terminal, without showing what is typed.
fn ask(prompt: &str) -> Result<String, Error> {
    let stdin = std::io::stdin();
    if !stdin.is_terminal() {
        return Err(Error::invalid("there is no key and no terminal to ask for a passphrase")
            .hint("name one with --key-file or --passphrase-file"));
    }
    let _ = write!(std::io::stderr(), "{prompt}");
    let _ = std::io::stderr().flush();
    let failed =
        |e: &dyn std::fmt::Display| Error::failed("cannot read a passphrase from the terminal").cause(e);
    let shown = rustix::termios::tcgetattr(&stdin).map_err(|e| failed(&e))?;
    let mut hidden = shown.clone();
    hidden.local_modes.remove(rustix::termios::LocalModes::ECHO);
    let set = |modes| rustix::termios::tcsetattr(&stdin, rustix::termios::OptionalActions::Now, modes);
    set(&hidden).map_err(|e| failed(&e))?;
    let mut line = String::new();
    let read = stdin.lock().read_line(&mut line);
    let _ = set(&shown);
    let _ = writeln!(std::io::stderr());
    read.map_err(|e| failed(&e))?;
    Ok(line.trim_end_matches(['\r', '\n']).to_owned())
}

pub fn now() -> WallTime {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    WallTime(since.as_millis() as u64)
}

/// An error of the repository as a person reads it.
pub fn describe(what: &str, error: &rempart_repository::Error) -> Error {
    use rempart_objects::ErrorKind as Place;
    let described = match error.kind {
        ErrorKind::WrongKey | ErrorKind::Exposed => Error::new(rempart_api::ErrorKind::Forbidden, what),
        ErrorKind::Invalid => Error::invalid(what),
        ErrorKind::Missing | ErrorKind::Objects(Place::Missing) => Error::not_found(what),
        ErrorKind::Refused | ErrorKind::Stale => Error::refused(what),
        ErrorKind::Objects(Place::Unavailable | Place::Unknown) => Error::unreachable(what),
        _ => Error::failed(what),
    };
    described.cause(chain(error))
}

/// Why there is no new key file. `serves`: what the one that is there does, unless somebody left it there who was ended.
pub fn no_new_key(what: &str, serves: &str, error: &rempart_repository::Error) -> Error {
    use std::io::{Error as IoError, ErrorKind as IoErrorKind};
    let source = error.source.as_deref().and_then(|source| source.downcast_ref::<IoError>());
    match source.is_some_and(|source| source.kind() == IoErrorKind::AlreadyExists) {
        true => describe(what, error).hint(format!(
            "no key is overwritten; if it is what a command left that was ended, and not a key that {serves}, remove it, \
             and begin again"
        )),
        false => describe(what, error),
    }
}

/// All causes, from the outermost inwards.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

/// Opens a place in which there may be a repository.
pub fn open_place(url: &str, key: &KeyArgs) -> Result<Arc<dyn Objects>, Error> {
    place(url, key, false)
}

/// Opens a place. A new repository's is made, if it is a directory, and tried out.
fn place(url: &str, key: &KeyArgs, create: bool) -> Result<Arc<dyn Objects>, Error> {
    use rempart_objects::ErrorKind as Place;
    let credentials = key.credentials.as_deref();
    let opened = if create {
        rempart_objects::create(url, credentials)
    } else {
        rempart_objects::open(url, credentials)
    };
    opened.map_err(|e| {
        // A URL may hold what nobody should see; the place itself shows what may be shown.
        let what = if e.place.is_empty() { url.to_owned() } else { e.place.clone() };
        let what = format!("cannot open the place `{what}`");
        let error = match e.kind {
            Place::Missing => Error::not_found(what),
            Place::Denied => Error::new(rempart_api::ErrorKind::Forbidden, what),
            Place::Unavailable | Place::Unknown => Error::unreachable(what),
            _ => Error::failed(what),
        };
        error.cause(chain(&e))
    })
}

impl Access {
    pub fn of(repo: String, key: KeyArgs) -> Access {
        Access { repo, key: CommandLineFirst(key) }
    }

    pub fn key_args(&self) -> &KeyArgs {
        &self.key
    }

    pub fn open(&self) -> Result<Arc<Repository>, Error> {
        let secret = self.key.secret(false)?;
        let place = self.place()?;
        let opened = Repository::open(place, &self.key.cache_dir, secret.unlock());
        opened.map(Arc::new).map_err(|e| describe(&format!("cannot open the repository `{}`", self.repo), &e))
    }

    /// Opens it to add to it, for which a key is enough that opens nothing.
    pub fn open_to_add(&self) -> Result<Arc<Repository>, Error> {
        let Some(path) = &self.key.key_file else { return self.open() };
        let key = AnyKey::load(path).map_err(|e| describe("cannot use the key file", &e))?;
        let AnyKey::Writes(key) = key else { return self.open() };
        let opened = Repository::open_to_add(self.place()?, &self.key.cache_dir, *key);
        opened.map(Arc::new).map_err(|e| describe(&format!("cannot open the repository `{}`", self.repo), &e))
    }

    /// The place alone.
    pub fn place(&self) -> Result<Arc<dyn Objects>, Error> {
        open_place(&self.repo, &self.key)
    }

    pub fn name(&self) -> &str {
        &self.repo
    }
}

pub fn create(command: Create, output: Output) -> Result<(), Error> {
    let chunk_size = u32::try_from(command.chunk_size).unwrap_or(u32::MAX);
    let chunk_size = ChunkSize::new(chunk_size).map_err(|e| Error::invalid(e.why.to_string()))?;
    let what = format!("cannot make a repository in `{}`", command.url);
    let secret = match &command.new_key_file {
        Some(_) => Secret::KeyFile(KeyFile::random()),
        None => command.key.secret(true)?,
    };
    let label = command.new_key_file.as_ref().map_or_else(String::new, |path| path.display().to_string());
    let id = RepositoryId::random();
    let new = NewRepository {
        id,
        chunk_size,
        unlock: secret.unlock(),
        cost: PassphraseCost::DEFAULT,
        label: &label,
        kept: command.immutable.map(Duration::from_secs),
        now: now(),
    };
    let place = place(&command.url, &command.key, true)?;
    if let (Some(path), Secret::KeyFile(file)) = (&command.new_key_file, &secret) {
        // Before anything that only it opens.
        let what = "cannot write the key file";
        file.create(path, &id).map_err(|e| no_new_key(what, "opens a repository", &e))?;
    }
    let repository =
        Repository::create(place, &command.key.cache_dir, new).map_err(|e| describe(&what, &e))?;
    if output.json {
        return output.print_json(&json!({
            "repository": repository.id().to_string(),
            "url": command.url,
            "chunk_bytes": repository.chunk_size().bytes(),
            "kept_ms": repository.description().kept_ms,
        }));
    }
    output.tell(&format!(
        "made repository {} in `{}`; whoever loses every key of it loses what is in it",
        repository.id(),
        command.url
    ));
    Ok(())
}
