//! A program that is told of events, one at a time, beside everything else.

use std::sync::Arc;

use tokio::sync::mpsc;

use super::super::backend::Site;
use crate::control::events::Event;
use crate::control::types::Envelope;
use crate::metrics::labels::HookResult;
use crate::plan::command;

/// Events that wait for the program. More are not told; they are in the log.
const QUEUE: usize = 256;

/// See the module.
pub(super) struct Hook {
    site: Arc<Site>,
    queue: mpsc::Sender<Event>,
}

impl Hook {
    /// Starts the task that runs the program. It ends with the hook, and what runs then is killed.
    pub fn start(site: Arc<Site>) -> Self {
        let (queue, events) = mpsc::channel(QUEUE);
        tokio::spawn(tell_all(site.clone(), events));
        Self { site, queue }
    }

    /// Has the program told, if there is one and it wants to know. Never waits.
    pub fn tell(&self, event: Event) {
        let config = self.site.config();
        if config.events.command.is_none() || !config.events.wants(event.kind) {
            return;
        }
        self.site.events.hook_now().waiting += 1;
        if let Err(error) = self.queue.try_send(event) {
            let mut now = self.site.events.hook_now();
            now.waiting -= 1;
            now.dropped += 1;
            drop(now);
            self.site.context.metrics.event_hook(HookResult::Dropped);
            let event = error.into_inner();
            tracing::warn!(seq = event.seq, kind = %event.kind, "the events' program is too slow and is not told");
        }
    }
}

async fn tell_all(site: Arc<Site>, mut events: mpsc::Receiver<Event>) {
    while let Some(event) = events.recv().await {
        // As configured now.
        let config = site.config();
        let Some(argv) = &config.events.command else {
            site.events.hook_now().waiting -= 1;
            continue;
        };
        let (seq, kind) = (event.seq, event.kind);
        let body = serde_json::to_vec(&Envelope::new(event)).expect("it has only plain fields");
        let told = command::run_fed(argv, &body, config.events.timeout).await;
        {
            let mut now = site.events.hook_now();
            now.waiting -= 1;
            match &told {
                Ok(()) => now.told += 1,
                Err(_) => now.failed += 1,
            }
            now.error = told.as_ref().err().cloned();
        }
        site.context.metrics.event_hook(match told {
            Ok(()) => HookResult::Ok,
            Err(_) => HookResult::Failed,
        });
        if let Err(error) = told {
            tracing::warn!(seq, %kind, error, "the events' program failed");
        }
    }
}
