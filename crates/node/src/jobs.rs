//! Work that outlasts one request: started here, asked about by number, forgotten at restart.

use rempart_api::{Error, Job, JobId, JobState, Progress};
use std::collections::BTreeMap;
use std::future::Future;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::watch;

/// Finished jobs kept for those who still want to ask.
const MAX_KEPT: usize = 256;

#[derive(Debug, Default)]
pub struct Jobs {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    next: u64,
    jobs: BTreeMap<JobId, watch::Receiver<Job>>,
}

/// A running job's way to tell how far it is.
#[derive(Debug, Clone)]
pub struct Reporter {
    sender: Arc<watch::Sender<Job>>,
}

impl Reporter {
    pub fn progress(&self, phase: impl Into<String>, done_bytes: u64, total_bytes: u64) {
        self.tell(Progress { phase: phase.into(), done_bytes, total_bytes, new_bytes: None });
    }

    pub fn tell(&self, progress: Progress) {
        self.sender.send_if_modified(|job| {
            let changed = job.progress != progress;
            job.progress = progress;
            changed
        });
    }

    pub fn phase(&self, phase: impl Into<String>) {
        self.progress(phase, 0, 0);
    }
}

impl Jobs {
    /// Starts `work` and answers its number at once.
    pub fn start<F, W>(&self, what: impl Into<String>, work: W) -> Job
    where
        W: FnOnce(Reporter) -> F,
        F: Future<Output = Result<serde_json::Value, Error>> + Send + 'static,
    {
        let mut inner = self.inner.lock().expect("no job panics while it holds the list");
        inner.next += 1;
        let job = Job {
            id: JobId(inner.next),
            what: what.into(),
            progress: Progress::default(),
            state: JobState::Running,
        };
        let (sender, receiver) = watch::channel(job.clone());
        inner.jobs.insert(job.id, receiver);
        inner.forget_oldest();
        drop(inner);
        let reporter = Reporter { sender: Arc::new(sender) };
        let future = work(reporter.clone());
        tokio::spawn(async move {
            // A panic in the work must not leave a job that runs for ever.
            let state = match tokio::spawn(future).await {
                Ok(Ok(result)) => JobState::Done { result },
                Ok(Err(error)) => JobState::Failed { error },
                Err(e) => JobState::Failed {
                    error: Error::failed("the job broke off by a defect of the daemon").cause(e),
                },
            };
            reporter.sender.send_modify(|job| job.state = state);
        });
        job
    }

    /// The job as it is now, or once it changed, or after `wait`.
    pub async fn get(&self, id: JobId, wait: Duration) -> Option<Job> {
        let mut receiver = {
            let inner = self.inner.lock().expect("no job panics while it holds the list");
            inner.jobs.get(&id)?.clone()
        };
        let ended = |job: &Job| job.state != JobState::Running;
        let _ = tokio::time::timeout(wait, receiver.wait_for(ended)).await;
        let job = receiver.borrow().clone();
        Some(job)
    }
}

impl Inner {
    fn forget_oldest(&mut self) {
        while self.jobs.len() > MAX_KEPT {
            let ended =
                self.jobs.iter().find(|(_, job)| job.borrow().state != JobState::Running).map(|(id, _)| *id);
            match ended {
                Some(id) => self.jobs.remove(&id),
                None => return,
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_job_ends_with_its_result_its_error_or_its_panic() {
        let jobs = Jobs::default();
        let good = jobs.start("good", |_| async { Ok(serde_json::json!(7)) });
        let bad = jobs.start("bad", |_| async { Err(Error::failed("no")) });
        let broken = jobs.start("broken", |_| async { panic!("defect") });
        let wait = Duration::from_secs(10);
        assert_eq!(jobs.get(good.id, wait).await.unwrap().state, JobState::Done { result: 7.into() });
        assert!(matches!(jobs.get(bad.id, wait).await.unwrap().state, JobState::Failed { .. }));
        assert!(matches!(jobs.get(broken.id, wait).await.unwrap().state, JobState::Failed { .. }));
        assert!(jobs.get(JobId(99), wait).await.is_none());
    }
}
