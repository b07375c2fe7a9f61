//! One guest's copy at this site: its journal and its image. Blocking; one owner at a time.

use std::time::{Duration, Instant};

use tokio::sync::{oneshot, watch};

use super::error::ReplicaError;
use super::follow::{Teller, Watched};
use super::image::Image;
use super::mark::GroupPoint;
use super::promote::Shown;
use crate::clock::Timestamp;
use crate::frame::{Decoding, FrameCheck, FrameError, PageImage, PartHeader, VerifiedPart};
use crate::ids::{Epoch, Generation, GuestId, ImageRoot};
use crate::journal::{
    Catalogue, Journal, JournalError, JournalOptions, RecoveryPoint, RecoveryReport, Retention,
    Store,
};
use crate::metrics::GuestMetrics;
use crate::page::Layout;
use crate::wire::body::Body;
use crate::wire::message::{Newest, Open, Opened, RefuseReason};

/// Frames up to this size are kept in memory until they are applied; larger ones are read back from
/// the journal. 64 MiB.
const KEEP_BYTES: usize = 64 << 20;

/// How a copy is kept.
#[derive(Debug, Clone)]
pub struct ReplicaOptions {
    /// The journal's.
    pub journal: JournalOptions,
    /// Which points are kept.
    pub retention: Retention,
    /// Most pages of RAM of a guest: what this host can hold. A peer's word sizes allocations.
    pub ram_pages_max: u64,
}

/// What becomes of a part.
#[derive(Debug)]
pub enum Receipt {
    /// The frame goes on.
    More,
    /// The frame is durable.
    Durable(RecoveryPoint),
    /// The image after the frame is not what the source has; the frame was dropped.
    Mismatch {
        /// The frame.
        epoch: Epoch,
        /// The source's root.
        expected: ImageRoot,
        /// Ours.
        found: ImageRoot,
    },
}

/// Number of a session with a primary; the newest owns the copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SessionId(pub(super) u64);

/// Snapshot for status and metrics.
#[derive(Debug, Clone)]
pub struct ReplicaStatus {
    /// The guest.
    pub guest: GuestId,
    /// Highest owner's number seen.
    pub generation: Generation,
    /// Newest recovery point.
    pub newest: Option<RecoveryPoint>,
    /// Oldest recovery point's instant.
    pub oldest_at: Option<Timestamp>,
    /// How many there are.
    pub points: usize,
    /// Points that are one of a group's, oldest first.
    pub groups: Vec<GroupPoint>,
    /// RPO target as the primary stated it.
    pub rpo_target: Option<Duration>,
    /// A session is up.
    pub receiving: bool,
    /// Bytes of parts taken since the start of this process.
    pub received_bytes: u64,
    /// Frames whose root differed, since the start of this process.
    pub mismatches: u64,
    /// Requests refused for their generation, since the start of this process.
    pub fence_rejections: u64,
    /// What is wrong; `None` when all is well.
    pub problem: Option<String>,
}

/// A frame that is arriving.
pub(super) struct Incoming {
    check: FrameCheck,
    /// The parts are in [`Replica::arrived`]; until together they are too many.
    kept: bool,
    parts: u32,
    bytes: usize,
}

/// See the module.
pub struct Replica<S: Store> {
    pub(super) guest: GuestId,
    pub(super) options: ReplicaOptions,
    pub(super) journal: Journal<S>,
    /// `None` until the layout is known, or after the image went to a promoted guest.
    pub(super) image: Option<Image>,
    /// The checkpoint that the image shows; `None` while it shows none.
    pub(super) shows: Option<Epoch>,
    /// A point of which no image could be made.
    pub(super) damaged: Option<Epoch>,
    /// The guest is being resumed from here, or was: no session may be opened.
    pub(super) promoted: bool,
    /// Its owner gives the guest away to here, and no record says yet what became of that.
    pub(super) taking: bool,
    pub(super) incoming: Option<Incoming>,
    /// Its parts.
    arrived: Decoding<Body>,
    /// The guest's last checkpoint before it is given away, and who is to be shown it.
    pub(super) last: Option<(Epoch, oneshot::Sender<Shown>)>,
    /// Somebody follows what becomes durable.
    pub(super) teller: Option<Teller>,
    pub(super) session: u64,
    pub(super) status: watch::Sender<ReplicaStatus>,
    pub(super) metrics: Option<GuestMetrics>,
}

impl<S: Store> Replica<S> {
    /// Opens (or creates) the copy. Its image is made when a session needs it, or by
    /// [`warm_up`](Self::warm_up).
    pub fn open_cold(
        store: S,
        catalogue: Box<dyn Catalogue>,
        guest: &GuestId,
        options: ReplicaOptions,
    ) -> Result<(Self, RecoveryReport), ReplicaError> {
        let (journal, report) = Journal::open(store, catalogue, guest, options.journal.clone())?;
        let status = ReplicaStatus {
            guest: guest.clone(),
            generation: journal.generation(),
            newest: None,
            oldest_at: None,
            points: 0,
            groups: Vec::new(),
            rpo_target: None,
            receiving: false,
            received_bytes: 0,
            mismatches: 0,
            fence_rejections: 0,
            problem: None,
        };
        let mut replica = Self {
            guest: guest.clone(),
            options,
            journal,
            image: None,
            shows: None,
            damaged: None,
            promoted: false,
            taking: false,
            incoming: None,
            arrived: Decoding::default(),
            last: None,
            teller: None,
            session: 0,
            status: watch::Sender::new(status),
            metrics: None,
        };
        replica.publish();
        replica.spare_groups();
        Ok((replica, report))
    }

    /// From now on commits and the journal's size are measured here.
    pub fn measure(&mut self, metrics: GuestMetrics) {
        self.metrics = Some(metrics);
    }

    /// Follows the copy's state.
    pub fn subscribe(&self) -> watch::Receiver<ReplicaStatus> {
        self.status.subscribe()
    }

    /// The journal, for questions.
    pub fn journal(&self) -> &Journal<S> {
        &self.journal
    }

    /// The journal, for pins, checks and rebuilds.
    pub fn journal_mut(&mut self) -> &mut Journal<S> {
        &mut self.journal
    }

    pub(super) fn publish(&self) {
        let points = self.journal.points();
        self.status.send_modify(|s| {
            s.generation = self.journal.generation();
            s.newest = self.journal.newest().cloned();
            s.oldest_at = points.first().map(|p| p.captured_at);
            s.points = points.len();
            s.groups = GroupPoint::among(&points);
        });
    }

    pub(super) fn problem(&self, error: &ReplicaError) {
        let text = error.to_string();
        // Said once: some things are tried again and again.
        if self.status.borrow().problem.as_ref() != Some(&text) {
            tracing::warn!(guest = %self.guest, "{text}");
            self.status.send_modify(|s| s.problem = Some(text));
        }
    }

    /// The image of the newest point, or of the ground if there is no point. After an error there is
    /// none.
    pub(super) fn rebuild_image(&mut self) -> Result<(), ReplicaError> {
        (self.image, self.shows) = (None, None);
        let Some(layout) = self.journal.layout().cloned() else {
            return Ok(());
        };
        let mut image = Image::new(&layout)?;
        if let Some(newest) = self.journal.newest().cloned() {
            self.damaged = Some(newest.epoch);
            self.journal.replay(newest.epoch, &mut image)?;
            let found = image.root();
            if found != newest.root {
                let (epoch, expected) = (newest.epoch, newest.root);
                return Err(ReplicaError::Root {
                    epoch,
                    expected,
                    found,
                });
            }
            (self.shows, self.damaged) = (Some(newest.epoch), None);
        } else if let Some((epoch, root)) = self.journal.ground() {
            self.journal.ground_image()?.replay(&mut image)?;
            // Ground that is damaged is of no use, and no loss.
            match image.root() == root {
                true => self.shows = Some(epoch),
                false => image = Image::new(&layout)?,
            }
        }
        self.image = Some(image);
        Ok(())
    }

    /// A primary opens a session. Ends the one before.
    ///
    /// Errors are answers to the peer: fenced, or refused with a reason.
    pub fn open_session(&mut self, open: &Open) -> Result<(SessionId, Opened), super::Refusal> {
        use super::Refusal;
        let ours = self.journal.generation();
        if open.generation < ours {
            self.status.send_modify(|s| s.fence_rejections += 1);
            return Err(Refusal::Fenced { generation: ours });
        }
        if self.promoted {
            return Err(Refusal::Refused(
                RefuseReason::Busy,
                "the guest is being resumed here".into(),
            ));
        }
        if let Some(layout) = self.journal.layout()
            && *layout != open.layout
        {
            return Err(Refusal::Refused(
                RefuseReason::Layout,
                "the guest's memory or disks have another size than in the journal here; run `lifeboat unprotect --purge` at this site and protect it anew".into(),
            ));
        }
        let ram = open.layout.ram_pages();
        if !(2..=self.options.ram_pages_max).contains(&ram) {
            return Err(Refusal::Refused(
                RefuseReason::Layout,
                format!(
                    "a guest with {} MiB of memory is more than this site can hold ({} MiB)",
                    ram >> 8,
                    self.options.ram_pages_max >> 8
                ),
            ));
        }
        let internal =
            |e: ReplicaError| Refusal::Refused(RefuseReason::JournalFailed, e.to_string());
        self.drop_incoming();
        if open.generation > ours {
            self.journal
                .raise_generation(open.generation)
                .map_err(|e| internal(e.into()))?;
        }
        self.ready_image(&open.layout).map_err(internal)?;
        self.session += 1;
        self.status.send_modify(|s| {
            s.receiving = true;
            s.rpo_target = Some(open.rpo_target);
        });
        self.publish();
        let newest = self.journal.newest().map(|p| Newest {
            epoch: p.epoch,
            root: p.root,
            captured_at: p.captured_at,
            intact: self.shows == Some(p.epoch),
        });
        let opened = Opened {
            journal: self.journal.id(),
            generation: self.journal.generation(),
            newest,
            highest_epoch: self.journal.highest_epoch(),
            ground: self.ground().is_some() || self.journal.rest().is_some(),
        };
        Ok((SessionId(self.session), opened))
    }

    /// An image of the newest point; if it is damaged or there is none, one that shows no point, for
    /// a full copy.
    pub(super) fn ready_image(&mut self, layout: &Layout) -> Result<(), ReplicaError> {
        if self.image.is_none() {
            match self.rebuild_image() {
                Err(error) if error.is_damage() => self.problem(&error),
                rebuilt => rebuilt?,
            }
        }
        if self.image.is_none() {
            self.image = Some(Image::new(layout)?);
        }
        Ok(())
    }

    /// A session ended, for whatever reason.
    pub fn close_session(&mut self, session: SessionId) {
        if session.0 == self.session {
            self.drop_incoming();
            self.status.send_modify(|s| s.receiving = false);
        }
    }

    /// The frame that is under way will not come to its end. What arrived of a first copy stays.
    pub(super) fn drop_incoming(&mut self) {
        self.last = None;
        self.drop_frame();
    }

    fn drop_frame(&mut self) {
        self.incoming = None;
        self.arrived.clear();
        self.journal.cut_off();
    }

    /// Ends the session for good: this copy is about to be deleted, or to be opened anew. What its
    /// primary sends from now on is refused and not acknowledged.
    pub fn retire(&mut self) {
        self.drop_incoming();
        self.session += 1;
        self.status.send_modify(|s| s.receiving = false);
    }

    pub(super) fn own(&self, session: SessionId) -> Result<(), ReplicaError> {
        if session.0 == self.session {
            return Ok(());
        }
        Err(ReplicaError::Stale {
            generation: self.journal.generation(),
        })
    }

    /// The source gave the frame up.
    pub fn abandon(&mut self, session: SessionId) -> Result<(), ReplicaError> {
        self.own(session)?;
        self.drop_incoming();
        Ok(())
    }

    /// Takes one part. After an error the frame is dropped; after an error of the journal the copy
    /// must be opened anew.
    pub fn part(
        &mut self,
        session: SessionId,
        bytes: impl Into<Body>,
        now: Timestamp,
    ) -> Result<Receipt, ReplicaError> {
        self.own(session)?;
        let bytes = bytes.into();
        self.status
            .send_modify(|s| s.received_bytes += bytes.len() as u64);
        let result = self.take_part(bytes, now);
        if let Err(error) = &result {
            self.drop_incoming();
            let problem = error.to_string();
            self.status.send_modify(|s| s.problem = Some(problem));
        }
        result
    }

    fn take_part(&mut self, bytes: Body, now: Timestamp) -> Result<Receipt, ReplicaError> {
        let header = PartHeader::parse(&bytes)?;
        if header.part == 0 {
            // A frame that was begun and not ended is void: the source lost interest in it.
            self.drop_frame();
        }
        let mut incoming = self.incoming.take().unwrap_or_else(|| Incoming {
            check: FrameCheck::new(),
            kept: true,
            parts: 0,
            bytes: 0,
        });
        let image = self.image.as_ref();
        let layout = image.expect("an open session has an image").layout();
        let arrived = &mut self.arrived;
        let mut check = |part: &VerifiedPart<Body>| {
            let view = part.view();
            view.check_layout(layout)?;
            incoming.check.add(&view)?;
            // Decoded while the disk writes and other parts come.
            if incoming.kept {
                arrived.push(part.clone());
            }
            Ok(())
        };
        if header.last {
            let part = VerifiedPart::verify(bytes).map_err(|(error, _)| error)?;
            check(&part)?;
            return self.last_part(incoming, &part, now);
        }
        let written = self.journal.write_part(bytes, check);
        let part = written.map_err(|error| match error {
            JournalError::Frame(error) => ReplicaError::Frame(error),
            other => other.into(),
        })?;
        incoming.parts += 1;
        incoming.bytes += part.view().bytes().len();
        if incoming.bytes > KEEP_BYTES {
            incoming.kept = false;
            self.arrived.clear();
        }
        self.incoming = Some(incoming);
        Ok(Receipt::More)
    }

    /// The layout that the session was opened with, and that the journal has if it has one.
    pub(super) fn session_layout(&self) -> &Layout {
        let image = self.image.as_ref();
        image.expect("an open session has an image").layout()
    }

    fn last_part(
        &mut self,
        mut incoming: Incoming,
        last: &VerifiedPart<Body>,
        now: Timestamp,
    ) -> Result<Receipt, ReplicaError> {
        let view = &last.view();
        std::mem::take(&mut incoming.check).finish()?;
        let footer = view.footer().expect("the caller saw the footer");
        let manifest = view.manifest()?;
        if manifest.layout != *self.session_layout() {
            return Err(FrameError::Manifest("its layout is not the session's".into()).into());
        }
        let (epoch, expected) = (view.header().epoch, footer.root);
        self.shows = None;
        let mut image = self.image.take().expect("an open session has an image");
        if view.header().full {
            // As the journal replays it: nothing of before shows through.
            drop(image);
            image = Image::new(&manifest.layout)?;
        }
        // From here on the image is not the newest point's any more; it is put back only when the
        // frame is durable.
        let teller = self.teller.as_ref().filter(|teller| teller.wanted());
        let (applied, seen) = match teller.map(Teller::limit) {
            None => (self.apply(&incoming, last, &mut image), None),
            Some(limit) => {
                let mut watched = Watched::new(&mut image, limit);
                let applied = self.apply(&incoming, last, &mut watched);
                (applied, Some(watched.seen()))
            }
        };
        let found = image.root();
        let receipt = match applied {
            Ok(()) if found == expected => {
                if let Some((_, show)) = self.last.take_if(|(last, _)| *last == epoch) {
                    // Whoever asked may have lost interest.
                    let _ = show.send(Shown {
                        epoch,
                        manifest: manifest.clone(),
                        ram: image.fd(),
                    });
                }
                let started = Instant::now();
                let point = self.journal.commit(view, now)?;
                if let Some(metrics) = &self.metrics {
                    metrics.journal_sync(started.elapsed());
                }
                (self.image, self.shows) = (Some(image), Some(epoch));
                self.status.send_modify(|s| s.problem = None);
                self.publish();
                if let Some(seen) = seen {
                    self.tell(&point, seen, view.header().full, manifest);
                }
                return Ok(Receipt::Durable(point));
            }
            Ok(()) => Receipt::Mismatch {
                epoch,
                expected,
                found,
            },
            Err(error) => {
                self.journal.abort();
                self.rebuild_image()?;
                return Err(error);
            }
        };
        self.journal.abort();
        self.status.send_modify(|s| {
            s.mismatches += 1;
            s.problem = Some(format!(
                "checkpoint #{epoch} gave image root {found} here and {expected} at the source; it was dropped and a full copy was asked for"
            ));
        });
        // Not only an image of the newest point: the journal may have none, and the session goes on.
        self.ready_image(&manifest.layout)?;
        Ok(receipt)
    }

    /// Applies the parts that arrived, of which this is the last.
    fn apply(
        &mut self,
        incoming: &Incoming,
        last: &VerifiedPart<Body>,
        image: &mut dyn PageImage,
    ) -> Result<(), ReplicaError> {
        if !incoming.kept {
            for part in 0..incoming.parts {
                let bytes = Body::from(self.journal.pending_part(part)?);
                let part = VerifiedPart::verify(bytes).map_err(|(error, _)| error)?;
                self.arrived.push(part);
                // One is read while another one is decoded.
                if self.arrived.waiting() > 1 {
                    self.arrived.apply_next(image)?;
                }
            }
            self.arrived.push(last.clone());
        }
        while self.arrived.apply_next(image)? {}
        self.arrived.clear();
        Ok(())
    }
}
