//! What `rempart status --json` says, as far as the demo looks at it.

use serde_json::Value;

/// One virtual machine as one node sees it.
#[derive(Debug, Clone, PartialEq)]
pub struct VmStatus(Value);

impl VmStatus {
    /// Picks the machine out of a node's status.
    pub fn find(status: &Value, name: &str) -> Option<VmStatus> {
        let vms = status["vms"].as_array()?;
        vms.iter().find(|vm| vm["name"] == name).map(|vm| VmStatus(vm.clone()))
    }

    pub fn is_primary(&self) -> bool {
        self.0["role"] == "primary"
    }

    pub fn is_running(&self) -> bool {
        self.0["state"] == "running"
    }

    pub fn is_mirrored(&self) -> bool {
        self.0["mirrored"] == true
    }

    pub fn is_frozen(&self) -> bool {
        self.0["frozen"] == true || self.0["state"] == "paused"
    }

    pub fn in_sync(&self) -> Vec<&str> {
        self.0["in_sync"].as_array().into_iter().flatten().filter_map(Value::as_str).collect()
    }

    pub fn resync(&self) -> Option<Resync> {
        let resync = &self.0["resync"];
        Some(Resync {
            bytes_sent: resync["bytes_sent"].as_u64()?,
            bytes_changed: resync["bytes_changed"].as_u64()?,
            bytes_total: resync["bytes_total"].as_u64()?,
            running: resync["running"].as_bool().unwrap_or(false),
        })
    }

    /// Texts of conditions and events, in lower case, with the time of each in ms since 1970.
    pub fn said(&self) -> Vec<(u64, String)> {
        let mut said = Vec::new();
        for list in ["conditions", "events"] {
            for entry in self.0[list].as_array().into_iter().flatten() {
                if let (Some(at), Some(text)) = (entry["since_unix_ms"].as_u64(), entry["text"].as_str()) {
                    said.push((at, text.to_lowercase()));
                }
            }
        }
        said
    }

    /// Records of the log that a returning peer was sent: "sends `b` the log after 5, to 9".
    pub fn log_sent_since(&self, unix_ms: u64) -> Option<u64> {
        let said = self.said();
        let lately = said.iter().filter(|(at, _)| *at >= unix_ms).map(|(_, text)| text);
        lately
            .filter_map(|text| {
                let (after, to) = text.split_once(" the log after ")?.1.split_once(", to ")?;
                to.parse::<u64>().ok()?.checked_sub(after.parse().ok()?)
            })
            .next_back()
    }

    /// Whether a condition, an event or the phase of a peer holds a word.
    pub fn says(&self, word: &str) -> bool {
        let mut phases =
            self.0["peers"].as_array().into_iter().flatten().filter_map(|peer| peer["phase"].as_str());
        phases.any(|phase| phase.contains(word)) || self.said().iter().any(|(_, text)| text.contains(word))
    }

    /// For messages: the status without its history.
    pub fn brief(&self) -> String {
        let field = |name: &str| format!("{name} {}", self.0[name]);
        ["state", "role", "epoch", "in_sync", "mirrored", "frozen", "conditions"].map(field).join(", ")
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Resync {
    pub bytes_sent: u64,
    pub bytes_changed: u64,
    pub bytes_total: u64,
    pub running: bool,
}
