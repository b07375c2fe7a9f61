//! Events: what happened at this site, kept durably, shown, and told to a program.
//!
//! ```text
//!   status of guests, links, runs,      watch: compares with       log: bounded, durable ─▶ admin API
//!   journal, certificates ── 1/s ─────▶ what was seen before ────▶ hook: bounded queue ──▶ [events] command
//! ```
//!
//! One task owns all of it. It looks at what the site says of itself, as an operator would, so no part
//! of the product has to know of events, and none can be held up by them: what comes and goes within a
//! second may be missed, what lasts is not. A full disk loses the log's newest lines and nothing else.

mod hook;
mod log;
mod watch;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::MissedTickBehavior;

use super::backend::Site;
use crate::config::resolved::SiteConfig;
use crate::control::events::{EVENTS_MAX, EventKind, Events, HookStatus, Severity};
use hook::Hook;
use log::EventLog;
use watch::{Draft, Seen, Watch};

/// How often the site is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// What was noticed, for whoever asks. The task below is the only writer.
#[derive(Clone, Default)]
pub(super) struct EventBook {
    log: Arc<Mutex<Option<EventLog>>>,
    /// How the program fares. The hook is the only writer.
    hook: Arc<Mutex<HookStatus>>,
}

impl EventBook {
    /// Events with a higher number, oldest first.
    pub fn after(&self, site: &Site, after: u64) -> Events {
        let log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        let events = log.as_ref().map(|log| log.after(after, EVENTS_MAX));
        let events = events.unwrap_or_default();
        Events {
            site: site.context.site.clone(),
            last: events.last().map_or(after, |event| event.seq),
            events,
        }
    }

    /// How the program that is told fares, if there is one.
    pub fn hook(&self, config: &SiteConfig) -> Option<HookStatus> {
        config.events.command.as_ref()?;
        Some(self.hook_now().clone())
    }

    fn hook_now(&self) -> MutexGuard<'_, HookStatus> {
        self.hook.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn open(&self, site: &Site) {
        let (book, state_dir) = (self.log.clone(), site.context.state_dir.clone());
        let opened = move || {
            let opened = EventLog::open(&state_dir);
            *book.lock().unwrap_or_else(PoisonError::into_inner) = Some(opened);
        };
        site.context.env.offload(opened).await;
    }

    /// Numbers what was noticed and keeps it.
    async fn add(&self, site: &Site, drafts: Vec<Draft>) -> Vec<crate::control::events::Event> {
        let (book, now) = (self.log.clone(), site.context.env.now());
        let added = move || {
            let mut log = book.lock().unwrap_or_else(PoisonError::into_inner);
            log.as_mut()
                .map_or_else(Vec::new, |log| log.add(drafts, now))
        };
        site.context.env.offload(added).await
    }
}

/// Looks at the site for ever.
pub(super) async fn run(site: Arc<Site>) {
    site.events.open(&site).await;
    let hook = Hook::start(site.clone());
    let mut watch = Watch::default();
    let started = Draft::new(
        EventKind::SiteStarted,
        Severity::Info,
        format!("the daemon of {} runs", site.context.site),
    );
    let mut drafts = vec![started];
    let mut tick = tokio::time::interval(LOOK_EVERY);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        drafts.extend(watch.look(look(&site)));
        if drafts.is_empty() {
            continue;
        }
        for event in site.events.add(&site, std::mem::take(&mut drafts)).await {
            hook.tell(event);
        }
    }
}

/// The site as it is now.
fn look(site: &Site) -> Seen {
    let config = site.config();
    let now = site.context.env.now();
    let names = site.names();
    let guests = names.iter().map(|name| {
        let status = site.guest_status(name);
        let mismatches = site.context.metrics.guest(name).mismatches();
        (name.clone(), watch::SeenGuest::of(&status, mismatches))
    });
    let space = super::space(&config.journal.path);
    Seen {
        guests: guests.collect(),
        peers: super::listener::peer_status(site)
            .into_iter()
            .map(|peer| (peer.name, (peer.up, peer.last_error)))
            .collect(),
        runs: site.runs.list().runs,
        journal_full: space
            .is_some_and(|(free, capacity)| free < config.journal.min_free.of(capacity)),
        certificates: site
            .certificates()
            .into_iter()
            .map(|cert| (cert.name, crate::pki::days_between(now, cert.not_after)))
            .collect(),
    }
}
