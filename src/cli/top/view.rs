//! What was seen, and what the operator chose to look at.

use std::collections::{BTreeMap, VecDeque};

use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyEventKind, KeyModifiers};

use crate::clock::Timestamp;
use crate::control::types::{GuestStatus, SiteStatus};
use crate::ids::GuestId;

/// Looks that a strip can show: as many as the widest terminals have columns for it.
const LOOKS_MAX: usize = 240;
/// Looks that a rate is taken over, so that it does not jump with each checkpoint.
const RATE_LOOKS: usize = 6;

/// What a key asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Then {
    GoOn,
    Quit,
    Interrupt,
}

/// What one guest did since it was first seen.
#[derive(Debug, Default)]
pub(super) struct Track {
    /// At each look: which share of its RPO target was used up, if that was known.
    shares: VecDeque<Option<f64>>,
    /// At the last looks: when, bytes sent so far, newest durable checkpoint.
    counts: VecDeque<(Timestamp, u64, u64)>,
}

impl Track {
    fn saw(&mut self, guest: &GuestStatus, now: Timestamp) {
        let share = guest.rpo_exposure_seconds.zip(guest.rpo_target_seconds);
        let share = share.filter(|(_, target)| *target > 0.0);
        self.shares
            .push_back(share.map(|(now, target)| now / target));
        if self.shares.len() > LOOKS_MAX {
            self.shares.pop_front();
        }
        let epoch = guest.last_point.as_ref().map_or(0, |point| point.epoch.0);
        let last = self.counts.back();
        // Counters that fell, and clocks that were set back, begin anew.
        if last.is_some_and(|&(at, sent, last)| now < at || guest.sent_bytes < sent || epoch < last)
        {
            self.counts.clear();
        }
        self.counts.push_back((now, guest.sent_bytes, epoch));
        if self.counts.len() > RATE_LOOKS {
            self.counts.pop_front();
        }
    }

    /// Shares of the target, oldest first; at most `most` of the newest.
    pub(super) fn shares(&self, most: usize) -> impl Iterator<Item = Option<f64>> + '_ {
        let skipped = self.shares.len().saturating_sub(most);
        self.shares.iter().skip(skipped).copied()
    }

    fn per_second(&self, count: impl Fn(&(Timestamp, u64, u64)) -> u64) -> Option<f64> {
        let (first, last) = (self.counts.front()?, self.counts.back()?);
        let seconds = last.0.since(first.0).as_secs_f64();
        (seconds > 0.0).then(|| (count(last) - count(first)) as f64 / seconds)
    }

    /// Bytes per second.
    pub(super) fn sent(&self) -> Option<f64> {
        self.per_second(|counts| counts.1)
    }

    /// Checkpoints per second that became durable.
    pub(super) fn points(&self) -> Option<f64> {
        self.per_second(|counts| counts.2)
    }
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct View {
    status: Option<SiteStatus>,
    tracks: BTreeMap<GuestId, Track>,
    chosen: Option<GuestId>,
    paused: bool,
    trouble: Option<String>,
}

impl View {
    /// The daemon answered.
    pub(super) fn saw(&mut self, status: SiteStatus) {
        self.trouble = None;
        let known = |name: &GuestId| status.guests.iter().any(|guest| guest.name == *name);
        self.tracks.retain(|name, _| known(name));
        for guest in &status.guests {
            let track = self.tracks.entry(guest.name.clone()).or_default();
            track.saw(guest, status.now);
        }
        if !self.chosen.as_ref().is_some_and(known) {
            self.chosen = status.guests.first().map(|guest| guest.name.clone());
        }
        self.status = Some(status);
    }

    /// The daemon did not answer. What it said last is still shown.
    pub(super) fn missed(&mut self, why: String) {
        self.trouble = Some(why);
    }

    /// A key was pressed.
    pub(super) fn key(&mut self, key: KeyEvent) -> Then {
        if key.kind == KeyEventKind::Release {
            return Then::GoOn;
        }
        match key.code {
            KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => {
                return Then::Interrupt;
            }
            KeyCode::Char('q') | KeyCode::Esc => return Then::Quit,
            KeyCode::Char('p') | KeyCode::Char(' ') => self.paused = !self.paused,
            KeyCode::Up => self.choose(|at, _| at.saturating_sub(1)),
            KeyCode::Down => self.choose(|at, last| last.min(at + 1)),
            KeyCode::Home => self.choose(|_, _| 0),
            KeyCode::End => self.choose(|_, last| last),
            _ => {}
        }
        Then::GoOn
    }

    fn choose(&mut self, to: impl Fn(usize, usize) -> usize) {
        let at = self.chosen_row().unwrap_or(0);
        let guests = self.guests();
        let last = guests.len().saturating_sub(1);
        self.chosen = guests.get(to(at, last)).map(|guest| guest.name.clone());
    }

    pub(super) fn status(&self) -> Option<&SiteStatus> {
        self.status.as_ref()
    }

    pub(super) fn guests(&self) -> &[GuestStatus] {
        self.status.as_ref().map_or(&[], |status| &status.guests)
    }

    pub(super) fn track(&self, guest: &GuestId) -> Option<&Track> {
        self.tracks.get(guest)
    }

    pub(super) fn chosen_row(&self) -> Option<usize> {
        let chosen = self.chosen.as_ref()?;
        self.guests().iter().position(|guest| guest.name == *chosen)
    }

    pub(super) fn is_paused(&self) -> bool {
        self.paused
    }

    pub(super) fn trouble(&self) -> Option<&str> {
        self.trouble.as_deref()
    }
}
