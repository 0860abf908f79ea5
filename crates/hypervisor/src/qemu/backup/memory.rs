//! A guest's memory and devices, as they are at a view's instant.
//!
//! QEMU sends them as it sends a machine that moves to another host, while the guest runs on, and stops the guest for the
//! rest of it. It gives the images up then, and they are taken back; the view is cut, and the guest goes on.
//!
//! | the guest | what is done | when it is lost half way |
//! |---|---|---|
//! | runs | the view's copying nodes are taken away: QEMU does not give up images that they keep | the view begins again |
//! | runs | QEMU sends the memory, again and again what was written meanwhile | a migration whose socket breaks fails, and the guest runs on |
//! | stands still, by QEMU | the rest, and the devices | the same; QEMU has the guest go on |
//! | stands still, the machine is sent | images are taken back, copying nodes made, the view is cut | the guest is told to go on: by this process, else by its [`DeadMan`], else by the next view |
//! | goes on | | |
//!
//! A guest that writes faster than its memory is sent may stand still longer after a few rounds, up to half of the limit; if
//! that is not enough, there is no such view.

use super::graph::Graph;
use super::{Cut, Prepared, TrackingToken, names};
use crate::dead_man::DeadMan;
use crate::error::{Error, ErrorKind, Result};
use crate::qemu::saved_memory::{
    ACTION, Receiver, SavedMemory, all_came, not_sent, refuse_strange_capabilities, refused,
};
use crate::qmp::migration::MigrationParameters;
use crate::qmp::{Client, Event, Heard};
use serde_json::{Value, json};
use std::fs::File;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

/// How to keep a guest's memory.
#[derive(Debug, Clone)]
pub struct Saving {
    /// The guest stands still no longer, whatever happens here.
    pub limit: Duration,
    /// QEMU stops the guest as soon as it reckons that the rest takes no longer than this.
    pub downtime: Duration,
    /// Bytes a second that QEMU may send while the guest runs.
    pub bandwidth: u64,
    /// How often QEMU goes over the memory of a guest that writes to it. After a third of them the guest may stand still longer.
    pub rounds: u64,
}

impl Saving {
    /// 300 ms, 1 GiB/s, 20 rounds.
    pub fn new(limit: Duration) -> Self {
        Self { limit, downtime: Duration::from_millis(300), bandwidth: 1 << 30, rounds: 20 }
    }
}

/// The stream is at most so many times the memory, and so many bytes more.
const MOST_TIMES: u64 = 4;
const DEVICES: u64 = 256 << 20;
/// Without a byte from a guest that runs.
const SILENCE: Duration = Duration::from_secs(30);
const TICK: Duration = Duration::from_millis(100);
/// Between two looks at something that takes milliseconds.
const POLL: Duration = Duration::from_millis(2);

/// What came of it, and how long the guest stood still.
pub(super) type Saved = (Cut, SavedMemory, Duration);

/// States from which a guest that stands still because of us goes on.
pub(super) const OURS: [&str; 3] = ["paused", "postmigrate", "finish-migrate"];

/// Has a guest go on that stands still for a view.
pub(super) async fn go_on(client: &Client, limit: Duration) -> Result<()> {
    let end = Instant::now() + limit;
    loop {
        let status = client.query_status().await?;
        if status.running {
            return Ok(());
        }
        if !OURS.contains(&status.status.as_str()) {
            return Err(Error::new(
                ErrorKind::Refused,
                "have the guest go on",
                format!("it is `{}`", status.status),
            ));
        }
        // In the last moments of a migration QEMU refuses.
        let told = client.cont().await;
        if let (Err(error), true) = (told, Instant::now() > end) {
            return Err(error);
        }
        tokio::time::sleep(POLL).await;
    }
}

impl Prepared {
    /// Keeps the guest's memory, and takes the view at the same instant. In whatever way it fails, the guest goes on, and the
    /// view is good for [`Prepared::begin_again`] only.
    pub(super) async fn cut_with_memory(&mut self, saving: &Saving) -> Result<Saved> {
        let status = self.client.query_status().await?;
        if !status.running {
            return Err(refused(format!("it does not run: QEMU says `{}`", status.status)));
        }
        self.remove_copying().await?;
        self.refuse_what_hinders().await?;
        let activates = self.client.knows_command("blockdev-set-active").await?;
        let before = self.client.query_migrate_parameters().await?;
        if !before.tls_creds.is_empty() {
            return Err(refused("QEMU is set up to migrate by TLS only (`tls-creds`)"));
        }
        let most = self.client.query_memory_size().await?.saturating_mul(MOST_TIMES).saturating_add(DEVICES);
        let file = self.view.directory.make_memory(self.view.id)?;

        let command = |name, arguments: &Value| crate::qmp::message::command(u64::MAX, name, arguments);
        let message =
            [command("migrate-set-parameters", &json!(before)), command("cont", &Value::Null)].concat();
        let descriptor = self.client.descriptor().await.map_err(|error| Error::io(ACTION, error))?;
        self.view.directory.mark_paused()?;
        let dead_man = DeadMan::insist(descriptor.as_fd(), None, &message, saving.limit);
        let mut watch = Watch {
            dead_man: dead_man.map_err(|error| Error::io(ACTION, error))?,
            told: Instant::now(),
            stopped: None,
            receiver: None,
        };
        let rearm = |receiver: &Receiver| {
            let broken = Some(receiver.stream());
            DeadMan::insist(descriptor.as_fd(), broken, &message, saving.limit)
                .map_err(|error| Error::io(ACTION, error))
        };
        let taken = self.save(saving, activates, (file, most), &mut watch, rearm).await;
        // Nothing comes before this.
        if taken.is_err()
            && let Some(receiver) = &watch.receiver
        {
            receiver.break_off();
        }
        let continued = go_on(&self.client, saving.limit).await;
        let pause = watch.stopped.map_or(Duration::ZERO, |stopped| stopped.elapsed());
        let restored = self.client.migrate_set_parameters(&before).await;
        if continued.is_ok() {
            watch.dead_man.stand_down();
            self.view.directory.unmark_paused();
        }
        let (switched, next) = taken?;
        let rest = match continued.and(restored) {
            Ok(()) => self.finish(&next).await,
            Err(error) => Err(error),
        };
        let (instant, stall) = switched;
        let disks = self.or_forget(&next, rest).await?;
        let receiver = watch.receiver.expect("the machine was sent");
        let memory = receiver.finish();
        Ok(((instant, stall, disks), memory, pause))
    }

    /// What makes QEMU refuse only after all of the memory was sent, or makes the stream another one.
    async fn refuse_what_hinders(&self) -> Result<()> {
        refuse_strange_capabilities(&self.client).await?;
        if let Some(job) = self.client.query_jobs().await?.first() {
            return Err(refused(format!("a block job of another program runs (`{}`)", job.id)));
        }
        if let Some(export) = self.client.query_block_exports().await?.first() {
            return Err(refused(format!("another program reads its disks (export `{}`)", export.id)));
        }
        if Graph::read(&self.client).await?.copies_elsewhere() {
            return Err(refused("another program copies its disks just now"));
        }
        Ok(())
    }

    async fn save(
        &self,
        saving: &Saving,
        activates: bool,
        (file, most): (File, u64),
        watch: &mut Watch,
        rearm: impl Fn(&Receiver) -> Result<DeadMan>,
    ) -> Result<((Instant, Duration), Vec<TrackingToken>)> {
        let client = &self.client;
        let downtime = |time: Duration| MigrationParameters {
            max_bandwidth: saving.bandwidth,
            downtime_limit: time.as_millis() as u64,
            ..MigrationParameters::default()
        };
        let (listener, socket) = self.view.directory.listen_for_memory(self.owner)?;
        client.migrate_set_parameters(&downtime(saving.downtime)).await?;
        let mut events = client.events();
        let (receiver, mut ended) = Receiver::of_migration(client, listener, &socket, file, most).await?;
        let armed = rearm(&receiver)?;
        std::mem::replace(&mut watch.dead_man, armed).stand_down();
        watch.told = Instant::now();
        watch.receiver = Some(receiver);

        let (mut raised, mut heard) = (false, (0, Instant::now()));
        let mut tick = tokio::time::interval(TICK);
        loop {
            tokio::select! {
                biased;
                end = &mut ended => {
                    all_came(end)?;
                    break;
                }
                event = events.next() => match event {
                    Some(Heard::Event(Event::Stop)) => {
                        watch.stopped.get_or_insert_with(Instant::now);
                    }
                    Some(_) => {}
                    None => return Err(Error::new(ErrorKind::NotRunning, ACTION, "QEMU closed its monitor")),
                },
                _ = tick.tick() => {
                    if let Some(stopped) = watch.stopped {
                        if stopped.elapsed() > saving.limit * 3 / 4 {
                            return Err(Error::deadline("send the last of the guest's memory", stopped.elapsed()));
                        }
                        continue;
                    }
                    watch.is_in_time(saving.limit)?;
                    watch.go_on();
                    let bytes = watch.receiver.as_ref().map_or(0, Receiver::bytes);
                    if bytes != heard.0 {
                        heard = (bytes, Instant::now());
                    } else if heard.1.elapsed() > SILENCE {
                        return Err(Error::deadline("have QEMU send the guest's memory", SILENCE));
                    }
                    let Ok(migration) = client.query_migrate().await else { continue };
                    let rounds = migration.ram.dirty_sync_count;
                    if rounds > saving.rounds {
                        let detail = format!(
                            "it writes to its memory faster than QEMU sends it: after {} rounds what is left takes \
                             longer than {} ms",
                            saving.rounds,
                            (saving.limit / 2).as_millis()
                        );
                        return Err(refused(detail));
                    }
                    if rounds > saving.rounds / 3 && !raised {
                        client.migrate_set_parameters(&downtime(saving.limit / 2)).await?;
                        raised = true;
                    }
                }
            }
        }
        self.settled(saving, watch).await?;
        // From here on QEMU does nothing by itself any more.
        self.take_images_back(activates).await?;
        for (index, (disk, _)) in self.disks.iter().enumerate() {
            self.add_store(index).await?;
            self.add_copying(index, disk).await?;
        }
        let (switched, next) = self.switch().await?;
        // The watchman may have been first.
        let still = client.query_status().await.is_ok_and(|status| status.status == "postmigrate");
        let in_time = match still {
            true => Ok(()),
            false => Err(Error::deadline("take the view while the guest stood still", saving.limit)),
        };
        self.or_forget(&next, in_time).await?;
        Ok((switched, next))
    }

    /// Waits until QEMU says what came of the migration, whose stream has ended.
    async fn settled(&self, saving: &Saving, watch: &mut Watch) -> Result<()> {
        let end = Instant::now() + saving.limit / 2;
        loop {
            let migration = self.client.query_migrate().await?;
            match migration.status.as_str() {
                "completed" => break,
                "failed" | "cancelled" => {
                    watch.is_in_time(saving.limit)?;
                    return Err(not_sent(migration.error_desc));
                }
                _ if Instant::now() > end => {
                    return Err(Error::deadline("have QEMU end a migration", saving.limit / 2));
                }
                _ => tokio::time::sleep(POLL).await,
            }
        }
        // Its event may be on its way still.
        watch.stopped.get_or_insert_with(Instant::now);
        Ok(())
    }

    /// Without the guest going on. Before 10.0, to export an image is what takes it back.
    async fn take_images_back(&self, activates: bool) -> Result<()> {
        if activates {
            return self.client.blockdev_set_active().await;
        }
        for index in 0..self.disks.len() {
            let export = names::export(self.view.id, index);
            let top = names::node(self.view.id, names::Role::Top, index);
            let options =
                json!({ "type": "nbd", "id": export, "name": export, "node-name": top, "writable": false });
            self.client.block_export_add(options).await?;
            self.client.block_export_remove(&export).await?;
        }
        Ok(())
    }
}

/// Who watches over the guest meanwhile.
struct Watch {
    dead_man: DeadMan,
    /// When it was last told that all is well.
    told: Instant,
    /// When QEMU stopped it.
    stopped: Option<Instant>,
    receiver: Option<Receiver>,
}

impl Watch {
    fn go_on(&mut self) {
        self.dead_man.go_on();
        self.told = Instant::now();
    }

    /// This process may have stood still itself: the watchman has broken the migration off then.
    fn is_in_time(&self, limit: Duration) -> Result<()> {
        match self.told.elapsed() < limit {
            true => Ok(()),
            false => {
                let detail = format!("this program stood still itself for {} ms or more", limit.as_millis());
                Err(Error::new(ErrorKind::Deadline, ACTION, detail))
            }
        }
    }
}
