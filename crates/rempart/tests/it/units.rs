//! The units for systemd, as systemd reads them.

use crate::rack::{PROGRAM, Rack};
use std::path::Path;
use std::process::Command;

#[test]
fn systemd_finds_nothing_wrong_with_the_units() {
    let rack = Rack::new();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../packaging/systemd");
    for unit in ["rempart.service", "rempart-witness.service"] {
        // It wants to see the program.
        let text = std::fs::read_to_string(folder.join(unit)).unwrap().replace("/usr/bin/rempart", PROGRAM);
        let path = rack.path(unit);
        std::fs::write(&path, text).unwrap();
        let output = Command::new("systemd-analyze").arg("verify").arg(&path).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && said.is_empty(), "{unit}: {said}");
    }
}
