//! Places by the names users give them.

use crate::bucket::{Credentials, Location, Patience};
use crate::{Bucket, Directory, Error, ErrorKind, Objects, probe};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What a user wrote.
enum Place {
    Directory(PathBuf),
    Bucket(Location),
}

/// The place at `url`: a path, `file://PATH`, `s3://BUCKET/PREFIX` or `az://ACCOUNT/CONTAINER/PREFIX` (options:
/// [`Location`]). Credentials are taken from the file `credentials` ([`Credentials::from_file`]) or, without one, from the
/// environment.
pub fn open(url: &str, credentials: Option<&Path>) -> Result<Arc<dyn Objects>, Error> {
    match parse(url)? {
        Place::Directory(path) => Ok(Arc::new(Directory::open(&path)?)),
        Place::Bucket(location) => bucket(location, credentials),
    }
}

/// The same, for a new repository: a directory is made, and the place must pass [`probe`].
pub fn create(url: &str, credentials: Option<&Path>) -> Result<Arc<dyn Objects>, Error> {
    let place: Arc<dyn Objects> = match parse(url)? {
        Place::Directory(path) => Arc::new(Directory::create(&path)?),
        Place::Bucket(location) => bucket(location, credentials)?,
    };
    probe(&*place)?;
    Ok(place)
}

fn parse(url: &str) -> Result<Place, Error> {
    let refused = |why: Box<dyn std::error::Error + Send + Sync>| {
        Error::at_place(ErrorKind::Failed, "open", shown(url), why)
    };
    if let Some(path) = url.strip_prefix("file://") {
        let path = Path::new(path);
        if !path.is_absolute() {
            return Err(refused("a file URL names a path from the root: file:///PATH".into()));
        }
        return Ok(Place::Directory(path.to_owned()));
    }
    // A path may hold anything; a scheme in front of `://` would be an odd one.
    if !url.contains("://") {
        return Ok(Place::Directory(PathBuf::from(url)));
    }
    Location::parse(url).map(Place::Bucket).map_err(|error| refused(error.into()))
}

/// Without what could be a secret.
fn shown(url: &str) -> String {
    let url = url.split(['?', '#']).next().unwrap_or("");
    match (url.split_once("://"), url.rsplit_once('@')) {
        (Some((scheme, _)), Some((_, behind))) => format!("{scheme}://…@{behind}"),
        _ => url.to_owned(),
    }
}

fn bucket(location: Location, credentials: Option<&Path>) -> Result<Arc<dyn Objects>, Error> {
    let credentials = match credentials {
        Some(path) => Credentials::from_file(path).map_err(|error| {
            Error::at_place(ErrorKind::Denied, "take credentials from", path.display().to_string(), error)
        })?,
        None => Credentials::from_environment(),
    };
    Ok(Arc::new(Bucket::open(location, &credentials, Patience::default())?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Created, Name};

    #[test]
    fn a_path_is_a_directory_and_a_new_one_is_tried_out() {
        let home = tempfile::tempdir().expect("a directory");
        let path = home.path().join("a b");
        let text = path.to_str().expect("text");
        assert_eq!(open(text, None).expect_err("not there").kind, ErrorKind::Missing);
        let place = create(text, None).expect("made");
        let name = Name::new("repository").expect("a name");
        assert_eq!(place.create(&name, &[b"1"], None).expect("created"), Created::New);
        let again = open(&format!("file://{text}"), None).expect("it is there");
        assert_eq!(again.get(&name, 1).expect("read"), b"1");
        assert_eq!(again.url(), text);
    }

    #[test]
    fn what_is_no_place_is_refused_without_telling_secrets() {
        for url in ["file://relative", "ftp://host/a", "s3://", "s3://key:secret@bucket", "s3://b?sig=secret"]
        {
            let error = open(url, None).expect_err(url);
            let told = format!("{error}: {} {error:?}", error.source);
            assert!(!told.contains("secret"), "{told}");
        }
    }
}
