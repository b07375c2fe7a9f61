//! Reading the configuration again while everything runs.

use std::sync::{Arc, PoisonError};

use super::backend::Site;
use super::orders::Order;
use crate::config::{self, Files};
use crate::control::codes::Reason;
use crate::control::types::{ApiError, Reloaded};

impl Site {
    /// Reads configuration and certificates again.
    pub async fn reload_now(&self) -> Result<Reloaded, ApiError> {
        let old = self.config();
        let loaded = config::load(&old.file, Files::Required).map_err(|e| {
            self.context.metrics.config_loaded(false);
            ApiError::new(Reason::Config, e.to_string())
        })?;
        let new = Arc::new(loaded.config);
        let mut applied = Vec::new();
        if let Some(material) = &self.material {
            let dropped = material.reload().map_err(|e| {
                self.context.metrics.config_loaded(false);
                ApiError::new(Reason::Config, e.to_string())
            })?;
            applied.push("tls".to_owned());
            if !dropped.is_empty() {
                tracing::warn!(
                    ?dropped,
                    "links were dropped: their certificates are not good any more"
                );
            }
            let mut fresh = super::dialers(&new, material, &self.context.env, &self.context.limits);
            let dialers = self.context.dialers.write();
            let mut dialers = dialers.unwrap_or_else(PoisonError::into_inner);
            // A role that runs goes on with the dialer that it has, and the status reads that one's
            // figures: a new one for the same link would look as if nothing were heard.
            for (peer, dialer) in dialers.iter() {
                if let (Some(before), Some(now)) = (old.peers.get(peer), new.peers.get(peer))
                    && before.same_link(now)
                    && fresh.contains_key(peer)
                {
                    fresh.insert(peer.clone(), dialer.clone());
                }
            }
            *dialers = fresh;
        }
        let now = self.context.env.now();
        self.context.limits.configure(&new, now);
        self.standbys.configure(new.clone());
        for (name, (handle, _)) in self.guests().iter() {
            let config = new.guests.get(name).cloned().map(Box::new);
            // A supervisor whose inbox is full is busy; it learns it at the next reload.
            if handle.orders.try_send(Order::Configure(config)).is_err() {
                tracing::warn!(guest = %name, "is busy and keeps its old configuration");
            }
        }
        let restart: Vec<String> = [
            ("site.name", old.site != new.site),
            ("site.state_dir", old.state_dir != new.state_dir),
            ("admin.socket", old.admin_socket != new.admin_socket),
            ("metrics.listen", old.metrics_listen != new.metrics_listen),
            ("listen.address", old.listen != new.listen),
            ("log", old.log != new.log),
            ("tls", old.tls != new.tls),
        ]
        .into_iter()
        .filter(|(_, changed)| *changed)
        .map(|(key, _)| key.to_owned())
        .collect();
        for (key, changed) in [
            ("peer", old.peers != new.peers),
            ("guest", old.guests != new.guests),
            ("group", old.groups != new.groups),
            ("journal", old.journal != new.journal),
            (
                "defaults",
                old.retention != new.retention || old.replication != new.replication,
            ),
            ("fencing", old.fencing != new.fencing),
            ("failover", old.rollback_window != new.rollback_window),
            ("drill", old.drill != new.drill),
            ("events", old.events != new.events),
        ] {
            if changed {
                applied.push(key.to_owned());
            }
        }
        self.config.send_replace(new);
        self.rehearse_anew();
        self.start_guests();
        self.context.metrics.config_loaded(true);
        Ok(Reloaded {
            applied,
            restart_needed: restart,
        })
    }
}
