//! Snapshots of logical volumes, by LVM's own programs: what is read of a volume is then of one instant.

use super::{checked, failed, run};
use crate::BackupError;
use serde::Deserialize;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Output;

/// Snapshots of ours have this tag: one whose maker was killed is found by it.
const TAG: &str = "rempart";
/// Without a wish a snapshot has room for this part of its volume to be overwritten.
const PART: u64 = 10;
/// Less room is not worth the try.
const LEAST: u64 = 16 << 20;

/// What LVM says of a volume.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Volume {
    vg_name: String,
    lv_name: String,
    lv_path: PathBuf,
    segtype: String,
    #[serde(deserialize_with = "number")]
    lv_size: u64,
    #[serde(deserialize_with = "number")]
    vg_free: u64,
}

/// LVM writes numbers as texts.
fn number<'de, D: serde::Deserializer<'de>>(from: D) -> Result<u64, D::Error> {
    String::deserialize(from)?.trim().parse().map_err(serde::de::Error::custom)
}

#[derive(Deserialize)]
struct Report {
    report: Vec<Volumes>,
}

#[derive(Deserialize)]
struct Volumes {
    lv: Vec<Volume>,
}

fn parse(report: &[u8]) -> Result<Vec<Volume>, serde_json::Error> {
    let report: Report = serde_json::from_slice(report)?;
    Ok(report.report.into_iter().flat_map(|volumes| volumes.lv).collect())
}

impl Volume {
    fn full_name(&self) -> String {
        format!("{}/{}", self.vg_name, self.lv_name)
    }

    /// How much of it may be overwritten while it is read; `None` where its pool has the room.
    fn room(&self, wished: Option<u64>) -> Result<Option<u64>, String> {
        if self.segtype == "thin" {
            return Ok(None);
        }
        let room = wished.unwrap_or((self.lv_size / PART).max(LEAST)).min(self.lv_size.max(LEAST));
        if self.vg_free < LEAST || wished.is_some_and(|wished| wished > self.vg_free) {
            return Err(format!("the volume group `{}` has {} bytes free", self.vg_name, self.vg_free));
        }
        Ok(Some(room.min(self.vg_free)))
    }

    /// What `lvcreate` is told.
    fn arguments(&self, name: &str, room: Option<u64>) -> Vec<String> {
        let fixed =
            ["--snapshot", "--permission", "r", "--addtag", TAG, "--setactivationskip", "n", "--name", name];
        let mut arguments: Vec<String> = fixed.map(str::to_owned).to_vec();
        if let Some(room) = room {
            arguments.extend(["--size".to_owned(), format!("{room}b")]);
        }
        arguments.push(self.full_name());
        arguments
    }
}

/// A volume as it was at one instant, until this is dropped.
#[derive(Debug)]
pub struct VolumeSnapshot {
    volume: Volume,
}

impl VolumeSnapshot {
    /// Of the volume that a device is; `None` if it is none. Where its group has no room for what is overwritten meanwhile, that
    /// is an error.
    pub fn of(device: &Path, room: Option<u64>) -> Result<Option<VolumeSnapshot>, BackupError> {
        let Some(volume) = volume(device.as_os_str().as_encoded_bytes().to_vec(), device)? else {
            return Ok(None);
        };
        let room = volume.room(room).map_err(|why| failed(device, why))?;
        let name = format!("{}-{TAG}-{}", volume.lv_name, std::process::id());
        let arguments = volume.arguments(&name, room);
        run("lvcreate", &arguments).and_then(checked).map_err(|why| failed(device, why))?;
        // Removed, whatever becomes of the rest.
        let mut snapshot = VolumeSnapshot { volume: Volume { lv_name: name, ..volume } };
        let found = self::volume(snapshot.volume.full_name().into_bytes(), device)?;
        snapshot.volume = found.ok_or_else(|| failed(device, "the snapshot is not there"))?;
        Ok(Some(snapshot))
    }

    /// Where it can be read.
    pub fn path(&self) -> &Path {
        &self.volume.lv_path
    }

    /// Removes those whose maker was killed; one that is in use stays. Returns how many.
    pub fn remove_leftovers() -> usize {
        let select = format!("lv_tags={TAG}");
        let Ok(found) = run("lvs", &report(&["--select", &select])) else { return 0 };
        let found = parse(&found.stdout).unwrap_or_default();
        found.iter().filter(|volume| remove(volume).is_ok()).count()
    }
}

impl Drop for VolumeSnapshot {
    fn drop(&mut self) {
        if let Err(error) = remove(&self.volume) {
            tracing::warn!(snapshot = self.volume.full_name(), %error, "a snapshot cannot be removed");
        }
    }
}

fn remove(volume: &Volume) -> io::Result<Output> {
    run("lvremove", &["--yes".to_owned(), volume.full_name()]).and_then(checked)
}

fn report(more: &[&str]) -> Vec<String> {
    let columns = "vg_name,lv_name,lv_path,segtype,lv_size,vg_free";
    let fixed = ["--reportformat", "json", "--units", "b", "--nosuffix", "-o", columns];
    fixed.iter().chain(more).map(|text| (*text).to_owned()).collect()
}

/// By its device or its name. `None` also where there is no LVM.
fn volume(wanted: Vec<u8>, device: &Path) -> Result<Option<Volume>, BackupError> {
    let wanted = String::from_utf8(wanted).map_err(|_| failed(device, "its name is no text"))?;
    match run("lvs", &report(&[&wanted])) {
        Ok(found) if found.status.success() => {
            let found = parse(&found.stdout).map_err(|error| failed(device, error.to_string()))?;
            Ok(found.into_iter().next())
        }
        Ok(_) => Ok(None),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(failed(device, error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REPORT: &str = r#"  {"report": [{"lv": [{"vg_name":"vg0", "lv_name":"root", "lv_path":"/dev/vg0/root",
        "segtype":"linear", "lv_size":"10737418240", "vg_free":"5368709120"}]}], "log": []}"#;

    fn root() -> Volume {
        parse(REPORT.as_bytes()).expect("a report").remove(0)
    }

    #[test]
    fn a_snapshot_has_bounded_room() {
        let volume = root();
        assert_eq!(volume.room(None), Ok(Some(1 << 30)));
        assert_eq!(volume.room(Some(2 << 30)), Ok(Some(2 << 30)));
        volume.room(Some(6 << 30)).expect_err("its group is not that large");
        assert_eq!(Volume { vg_free: 100 << 20, ..root() }.room(None), Ok(Some(100 << 20)));
        Volume { vg_free: 1 << 20, ..root() }.room(None).expect_err("there is none");
        assert_eq!(Volume { segtype: "thin".to_owned(), vg_free: 0, ..root() }.room(None), Ok(None));
    }

    #[test]
    fn lvcreate_is_told_all() {
        let told = root().arguments("root-rempart-1", Some(1 << 30)).join(" ");
        let expected = "--snapshot --permission r --addtag rempart --setactivationskip n --name root-rempart-1 \
                        --size 1073741824b vg0/root";
        assert_eq!(told, expected);
        assert!(!root().arguments("x", None).contains(&"--size".to_owned()));
    }

    #[test]
    fn what_is_no_report_is_refused() {
        for text in ["", "{}", "[]", r#"{"report":[{"lv":[{"vg_name":"a"}]}]}"#] {
            parse(text.as_bytes()).expect_err(text);
        }
        assert_eq!(parse(br#"{"report":[{"lv":[]}]}"#).expect("none"), []);
    }
}
