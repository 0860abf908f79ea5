//! What people and programs are told of a run.

use crate::config::NodeConfig;
use rempart_api::{BackupRun, MachineBackup, MachineOutcome, RunResult};
use rempart_notify::{MailConfig, Mailer, Message, NotifyError, Webhook, WebhookConfig};
use serde_json::json;

/// Who is told.
#[derive(Debug, Clone)]
pub struct Receivers {
    mail: Option<MailConfig>,
    webhook: Option<WebhookConfig>,
}

impl Receivers {
    pub fn new(config: &NodeConfig) -> Receivers {
        Receivers { mail: config.mail.clone(), webhook: config.webhook.clone() }
    }

    /// What keeps them from being told, as far as it can be known before. Blocks.
    pub fn check(&self) -> Vec<NotifyError> {
        let mail = self.mail.as_ref().and_then(|mail| Mailer::new(mail).err());
        mail.into_iter().chain(self.webhook.as_ref().and_then(|hook| Webhook::new(hook).err())).collect()
    }

    /// Tells each of them; why it could not. Blocks.
    pub fn tell(&self, node: &str, schedule: &str, repository: &str, run: &BackupRun) -> Vec<NotifyError> {
        let mail = self.mail.as_ref().map(|mail| {
            let message = Message {
                subject: subject(node, schedule, run),
                text: text(repository, run),
                ..Message::default()
            };
            Mailer::new(mail)?.send(&message)
        });
        let webhook = self.webhook.as_ref().map(|hook| {
            Webhook::new(hook)?.post(&json!({
                "event": "backup-run", "node": node, "schedule": schedule, "repository": repository, "run": run,
            }))
        });
        mail.into_iter().chain(webhook).filter_map(Result::err).collect()
    }
}

fn count(run: &BackupRun, outcome: MachineOutcome) -> usize {
    run.machines.iter().filter(|machine| machine.outcome == outcome).count()
}

fn subject(node: &str, schedule: &str, run: &BackupRun) -> String {
    let good = count(run, MachineOutcome::Success);
    let wanted = run.machines.len() - count(run, MachineOutcome::Elsewhere);
    let what = match run.result {
        Some(RunResult::Success) => "done",
        _ => "FAILED",
    };
    format!("Backup `{schedule}` on {node} {what}: {good} of {wanted} machines")
}

fn text(repository: &str, run: &BackupRun) -> String {
    let mut text = format!("Repository: {repository}\n\n");
    for machine in &run.machines {
        text += &format!("{}: {}\n", machine.vm, said(machine));
    }
    for error in &run.errors {
        text += &format!("\n{error}\n");
    }
    text
}

fn said(machine: &MachineBackup) -> String {
    let mut said = match machine.outcome {
        MachineOutcome::Success => {
            let point = machine.point.unwrap_or_default();
            let seconds = machine.ended_unix_ms.saturating_sub(machine.begun_unix_ms) / 1000;
            format!(
                "point {point} in {seconds} s, read {}, of it new {}, stored {}",
                mebibytes(machine.read_bytes),
                mebibytes(machine.new_bytes),
                mebibytes(machine.stored_bytes)
            )
        }
        MachineOutcome::Failed => format!("NOT BACKED UP, tried {} times", machine.tries),
        MachineOutcome::Elsewhere => "another node leads it".to_owned(),
        MachineOutcome::NotBegun if machine.error.is_some() => "NOT BACKED UP, not begun".to_owned(),
        MachineOutcome::NotBegun => "NOT BACKED UP, the window closed before".to_owned(),
    };
    if let Some(level) = machine.consistency.as_ref().filter(|_| machine.outcome == MachineOutcome::Success) {
        said += &format!(", consistency: {level}");
    }
    if let Some(copy) = machine.copy {
        said += &format!(", point {copy} of the second repository");
    }
    if let Some(error) = &machine.error {
        said += &format!("\n    {error}");
        if let Some(hint) = &error.hint {
            said += &format!("\n    {hint}");
        }
    }
    said
}

fn mebibytes(count: u64) -> String {
    format!("{:.1} MiB", count as f64 / f64::from(1 << 20))
}
