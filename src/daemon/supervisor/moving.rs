//! Giving the guest away: the owner's side of a planned move. See `primary::handover` for the drawing.
//!
//! The record says `Offered` from before the standby is told until the standby's word is known, or until
//! it is known that it was not told; a daemon that starts and finds it so asks, like one that lost the link in that moment.

use tokio::sync::mpsc;

use super::super::hardware;
use super::super::orders::{Moved, Reply};
use super::super::record::{self, GuestRecord, StagedRecord, Standing};
use super::{Process, Supervisor, failed};
use crate::control::codes::Reason;
use crate::control::types::ApiError;
use crate::guest::{Guest, GuestError, RunState};
use crate::ids::{Epoch, Generation, SiteId};
use crate::primary::{self, Command, HandoverEvent, Ownership, Standstill};

/// A move that somebody waits for.
pub(super) struct Moving {
    reply: Reply<Moved>,
    events: mpsc::Receiver<HandoverEvent>,
    /// What will be recorded when the guest is given away.
    staged: Option<(GuestRecord, StagedRecord)>,
}

/// What was offered, by the record.
struct Offer {
    record: GuestRecord,
    to: SiteId,
    generation: Generation,
    epoch: Epoch,
}

/// The next event of a handover, if one is under way.
pub(super) async fn handover_event(moving: &mut Option<Moving>) -> HandoverEvent {
    if let Some(moving) = moving
        && let Some(event) = moving.events.recv().await
    {
        return event;
    }
    // A role that is gone says how it ended when it is joined.
    std::future::pending().await
}

impl Supervisor {
    pub(super) async fn hand_over(&mut self, reply: Reply<Moved>) {
        let refused = match &self.process {
            _ if self.moving.is_some() => "the guest is being moved already",
            Process::Protecting { commands, .. } => {
                let (sender, events) = mpsc::channel(4);
                if commands.send(Command::HandOver(sender)).await.is_ok() {
                    self.moving = Some(Moving {
                        reply,
                        events,
                        staged: None,
                    });
                    return;
                }
                "its replication has just ended"
            }
            _ => "the guest is not replicated to another site",
        };
        // Whoever asked may have gone.
        let _ = reply.send(Err(ApiError::new(Reason::WrongState, refused)));
    }

    pub(super) fn handover(&mut self, event: HandoverEvent) {
        match event {
            HandoverEvent::Stage { epoch, done } => {
                if let Some(generation) = self.stage_offer(epoch) {
                    // A role that is gone does not care.
                    let _ = done.send(generation);
                }
            }
            HandoverEvent::Permit { epoch, answer } => match self.offer(epoch) {
                Ok(generation) => {
                    self.stands(RunState::Paused);
                    // A role that is gone did not send the offer; its end says so.
                    let _ = answer.send(generation);
                }
                Err(error) => {
                    tracing::error!(guest = %self.guest, %error, "the offer could not be recorded");
                }
            },
            HandoverEvent::Unoffered { done } => match self.unoffer() {
                Ok(()) => {
                    self.stands(RunState::Running);
                    // A role that is gone counts the guest as offered, and it is asked for.
                    let _ = done.send(());
                }
                Err(error) => {
                    tracing::error!(guest = %self.guest, %error, "the offer could not be undone");
                }
            },
            HandoverEvent::Ended(why) => self.stays(&why),
        }
    }

    /// What the guest does now, as we know without asking it.
    pub(super) fn stands(&self, state: RunState) {
        self.view.send_modify(|v| v.run_state = Some(state));
    }

    /// The record of an offer of this checkpoint, and under which number.
    fn offer_of(&self, epoch: Epoch) -> Result<(GuestRecord, Generation), ApiError> {
        let record = self.record.clone().unwrap_or_else(GuestRecord::first);
        let to = record.protected_to.clone();
        let to = to.ok_or_else(|| failed("the guest is not to be replicated any more"))?;
        let generation = record.generation.next();
        let standing = Standing::Offered {
            to,
            generation,
            epoch,
        };
        Ok((GuestRecord { standing, ..record }, generation))
    }

    /// Writes the record of an offer beside that of the guest, which runs yet. The number that it has.
    fn stage_offer(&mut self, epoch: Epoch) -> Option<Generation> {
        let (record, generation) = self.offer_of(epoch).ok()?;
        let staged = record::stage(&self.site.state_dir, &self.guest, &record);
        self.moving.as_mut()?.staged = Some((record, staged.ok()?));
        Some(generation)
    }

    fn offer(&mut self, epoch: Epoch) -> Result<Generation, ApiError> {
        let (record, generation) = self.offer_of(epoch)?;
        let staged = self.moving.as_mut().and_then(|moving| moving.staged.take());
        match staged.filter(|(of, _)| *of == record) {
            Some((_, staged)) => self.save_staged(record, staged)?,
            None => self.save(record)?,
        }
        tracing::info!(guest = %self.guest, %generation, "the guest is given away");
        Ok(generation)
    }

    /// What was to be offered was not: the standby knows nothing of it.
    fn unoffer(&mut self) -> Result<(), ApiError> {
        let Some(record) = self.record.clone() else {
            return Ok(());
        };
        match record.standing {
            // Also if it could not be recorded: a part of that may have been.
            Standing::Offered { .. } | Standing::Active => self.save(GuestRecord {
                standing: Standing::Active,
                ..record
            }),
            _ => Ok(()),
        }
    }

    /// Whoever waits for a move learns that there is none.
    pub(super) fn stays(&mut self, why: &str) {
        if let Some(moving) = self.moving.take() {
            let text = format!("the guest was not moved and stays here: {why}");
            tracing::warn!(guest = %self.guest, "{text}");
            // Whoever asked may have gone.
            let _ = moving.reply.send(Err(failed(text)));
        }
    }

    fn offered(&self) -> Option<Offer> {
        let record = self.record.clone()?;
        let Standing::Offered {
            to,
            generation,
            epoch,
        } = record.standing.clone()
        else {
            return None;
        };
        Some(Offer {
            record,
            to,
            generation,
            epoch,
        })
    }

    /// True if the guest is this site's, or was offered by it.
    pub(super) fn may_run(&self) -> bool {
        let standing = self.record.as_ref().map(|r| &r.standing);
        matches!(standing, Some(Standing::Active | Standing::Offered { .. }))
    }

    /// True while it is not known who has the guest.
    pub(super) fn in_doubt(&self) -> bool {
        let offered = matches!(
            self.record.as_ref().map(|r| &r.standing),
            Some(Standing::Offered { .. })
        );
        offered && !matches!(self.process, Process::Protecting { .. })
    }

    /// The standby runs the guest.
    pub(super) async fn gone(&mut self, standstill: Option<Standstill>) {
        let Some(offer) = self.offered() else {
            return;
        };
        let (epoch, generation) = (offer.epoch, offer.generation);
        let recorded = self.save(GuestRecord {
            standing: Standing::Moved {
                to: offer.to,
                generation,
            },
            protected_to: None,
            ..offer.record
        });
        if let Err(error) = recorded {
            // The record still says that the guest was offered: it is asked again.
            return self.problem(error.to_string());
        }
        if let Err(error) = self.end_here().await {
            tracing::error!(guest = %self.guest, %error, "the process of the moved guest could not be ended");
        }
        self.site.metrics.guest(&self.guest).forget_durable();
        self.problem(None);
        self.publish();
        if let Some(moving) = self.moving.take() {
            // Whoever asked may have gone.
            let _ = moving.reply.send(Ok(Moved {
                epoch,
                generation,
                standstill,
            }));
        }
    }

    /// Ends a QEMU whose guest stands still since it was given to another site: attaching to it would let
    /// the guest run.
    pub(super) async fn end_given(&self) -> Result<(), ApiError> {
        let Some(record) = &self.record else {
            return Ok(());
        };
        if record.standing == Standing::Active || !self.is_of_qemu() {
            return Ok(());
        }
        let hardware = record.machine.as_ref();
        let ended = hardware::end_migrated(&self.site, &self.guest, self.qemu(), hardware);
        ended.await.map_err(failed)
    }

    /// Finds out who has a guest that was offered.
    pub(super) async fn resolve(&mut self) {
        if let Err(error) = self.try_resolve().await {
            self.problem(error.to_string());
        }
    }

    async fn try_resolve(&mut self) -> Result<(), ApiError> {
        let Some(offer) = self.offered() else {
            return Ok(());
        };
        // Above the number that was offered: a site that answers will never take the guest under it.
        let ours = offer.generation.next();
        let (layout, machine) = self.shape()?;
        let options = self.options(&offer.to, ours)?;
        let dialer = self.site.dialer(&offer.to)?;
        let owner = primary::ask_owner(&self.site.env, &*dialer, &options, &layout, &machine).await;
        match owner {
            Ownership::Theirs => {
                self.gone(None).await;
                Ok(())
            }
            Ownership::Ours => self.keep(offer.record, ours).await,
            Ownership::Returned { generation } => {
                self.keep(offer.record, generation.max(ours)).await
            }
            Ownership::Fenced { generation, site } => {
                self.fence(offer.record, generation, site)?;
                self.end_here().await?;
                self.stays("a third site owns it");
                Ok(())
            }
            Ownership::Unknown(why) => Err(failed(format!(
                "the guest stands still: it was offered to site {}, which cannot be asked whether it runs it: {why}; if you are sure that it does not: lifeboat guest start {} --force",
                offer.to, self.guest
            ))),
        }
    }

    /// The guest stays ours, under a higher number than the one that was offered.
    pub(super) async fn keep(
        &mut self,
        record: GuestRecord,
        generation: Generation,
    ) -> Result<(), ApiError> {
        self.save(GuestRecord {
            standing: Standing::Active,
            generation,
            ..record
        })?;
        self.problem(None);
        self.stays("the other site did not take it");
        if self.holds_disks() {
            // It was switched off, and is so again.
            self.process = Process::Absent;
            self.publish();
            return Ok(());
        }
        if matches!(self.process, Process::Absent) && self.is_of_qemu() {
            // It stands still since the daemon before this one; attaching lets it run.
            if let Some(guest) = self.find().await? {
                self.hold(guest);
            }
            return self.protect_if_wanted();
        }
        if let Process::Held(guest) = &mut self.process {
            match guest.resume().await {
                Ok(()) => self.stands(RunState::Running),
                Err(GuestError::Gone(why)) => {
                    self.process = Process::Absent;
                    self.publish();
                    return Err(failed(format!("the guest's process is gone: {why}")));
                }
                Err(error) => return Err(failed(error)),
            }
        }
        self.protect_if_wanted()
    }
}
