//! The group thread's side of views that are served: who reads them, and what is told of their extents.

use super::block_status::{self, Images, Moment, Since};
use rempart_engine::{Bytes, DiskRange, Engine, ViewId, ViewReadError, ViewedExtents};
use rempart_nbd::ContextIndex;
use rempart_nbd::poller::Wake;
use rempart_nbd::server::Extent;
use rempart_types::{DiskIndex, Lsn};
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::mpsc::{self, TryRecvError};
use tokio::sync::oneshot;

/// What a view's server is told.
#[derive(Debug)]
pub enum ToView {
    Read {
        token: u64,
        /// Nothing where all of it is zero.
        result: Result<Option<Bytes>, ViewReadError>,
    },
    Status {
        token: u64,
        statuses: Vec<(ContextIndex, Vec<Extent>)>,
    },
    Lost {
        why: String,
    },
}

/// The first extent's token; the others' are the numbers after it.
#[derive(Debug, Clone, Copy)]
pub struct ExtentsWanted {
    pub token: u64,
    pub extents: ViewedExtents,
}

#[derive(Debug)]
pub struct StatusWanted {
    pub token: u64,
    pub range: DiskRange,
    pub contexts: Vec<ContextIndex>,
}

/// The group thread's way to a view's server. The server ends when it is dropped.
#[derive(Debug)]
pub struct ViewSender {
    sender: Option<mpsc::Sender<ToView>>,
    wake: Arc<Wake>,
}

#[derive(Debug)]
pub struct ViewInbox {
    receiver: mpsc::Receiver<ToView>,
    wake: Arc<Wake>,
}

/// A way to a view's server, and its end there.
pub fn view_channel() -> io::Result<(ViewSender, ViewInbox)> {
    let (sender, receiver) = mpsc::channel();
    let wake = Arc::new(Wake::new()?);
    Ok((ViewSender { sender: Some(sender), wake: wake.clone() }, ViewInbox { receiver, wake }))
}

impl ViewSender {
    fn send(&self, message: ToView) {
        if let Some(sender) = &self.sender
            && sender.send(message).is_ok()
        {
            self.wake.wake();
        }
    }
}

impl Drop for ViewSender {
    fn drop(&mut self) {
        // Before the wake-up: it is to find nobody at this end.
        self.sender = None;
        self.wake.wake();
    }
}

impl ViewInbox {
    pub fn wake_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    /// Call when the descriptor is readable, before taking messages: what comes after it wakes again.
    pub fn reset(&self) {
        self.wake.reset();
    }

    /// `Ok(None)`: there is none now. An error: nobody sends any more.
    pub fn take(&self) -> Result<Option<ToView>, TryRecvError> {
        match self.receiver.try_recv() {
            Ok(message) => Ok(Some(message)),
            Err(TryRecvError::Empty) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// An open view, and who reads it.
#[derive(Debug)]
pub struct ServedView {
    pub at: Lsn,
    /// Disks of which it is known what changed since an earlier position.
    pub since: BTreeMap<DiskIndex, Since>,
    pub server: ViewSender,
    /// Told why, when the view is lost.
    pub lost: Option<oneshot::Sender<String>>,
}

#[derive(Debug, Default)]
pub struct ServedViews {
    open: BTreeMap<ViewId, ServedView>,
    images: Images,
}

impl ServedViews {
    pub fn serve(&mut self, view: ViewId, served: ServedView) {
        self.open.insert(view, served);
    }

    pub fn close(&mut self, view: ViewId) {
        self.open.remove(&view);
    }

    /// Disks came, went or grew.
    pub fn disks_changed(&mut self) {
        self.images.forget();
    }

    pub fn read(&self, view: ViewId, token: u64, result: Result<Option<Bytes>, ViewReadError>) {
        if let Some(served) = self.open.get(&view) {
            served.server.send(ToView::Read { token, result });
        }
    }

    /// The engine gave it up. Its server goes on telling so until it is closed.
    pub fn ended(&mut self, view: ViewId, why: String) {
        if let Some(served) = self.open.get_mut(&view) {
            if let Some(lost) = served.lost.take() {
                let _ = lost.send(why.clone());
            }
            served.server.send(ToView::Lost { why });
        }
    }

    pub fn status(&mut self, engine: &Engine, view: ViewId, wanted: &StatusWanted) {
        let Some(served) = self.open.get(&view) else { return };
        let since = served.since.get(&wanted.range.disk).copied();
        let moment = Moment { image_at: served.at, since };
        let statuses =
            block_status::statuses(engine, &mut self.images, wanted.range, &wanted.contexts, moment);
        served.server.send(ToView::Status { token: wanted.token, statuses });
    }
}
