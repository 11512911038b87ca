//! An s3s-fs server on a thread of its own, for tests that are not async: it serves as long as somebody drives its runtime.

use std::thread::JoinHandle;

use tokio::sync::oneshot;

use crate::s3s::S3sFs;

pub(crate) struct S3sThread {
    pub(crate) endpoint: String,
    ended: oneshot::Sender<()>,
    thread: JoinHandle<()>,
}

impl S3sThread {
    /// With these buckets.
    pub(crate) fn start(buckets: &[&'static str]) -> Self {
        let (ended, end) = oneshot::channel();
        let (started, endpoint) = std::sync::mpsc::channel();
        let buckets = buckets.to_vec();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(async {
                let server = S3sFs::start().await;
                buckets.iter().for_each(|b| server.make_bucket(b));
                started.send(server.endpoint()).expect("the test waits");
                let _ = end.await;
            });
        });
        Self { endpoint: endpoint.recv().expect("s3s-fs starts"), ended, thread }
    }

    pub(crate) fn stop(self) {
        drop(self.ended);
        self.thread.join().expect("s3s-fs ends");
    }
}
