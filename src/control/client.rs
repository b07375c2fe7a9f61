//! The client end of the admin API.

use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::{Method, Request, header};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use super::bandwidth::{Bandwidth, BandwidthRequest};
use super::checkpoint::{Checkpoint, CheckpointRequest};
use super::codes::Reason;
use super::events::Events;
use super::facts::Facts;
use super::requests::{StartRequest, UnprotectRequest, VerifyRequest};
use super::types::{
    AddressRequest, ApiError, ConsoleInfo, Document, Done, DrillRequest, Envelope, ExportRequest,
    Exports, FailoverRequest, JournalStat, MoveRequest, Networks, Points, ProtectRequest, Reloaded,
    Run, RunId, Runs, SeedRequest, SiteStatus,
};
use crate::guest::network::ADDRESS_WITHIN_MAX;
use crate::ids::{Epoch, GroupId, GuestId, SiteId};

/// Largest answer that is taken: some 50 000 recovery points.
const ANSWER_BYTES_MAX: usize = 32 << 20;
/// No verb takes longer to answer: what does is a run.
const ANSWER_WITHIN: Duration = Duration::from_secs(60);
/// Except for a checkpoint, which waits for programs of the operator (each of which is bounded).
const CHECKPOINT_WITHIN: Duration = Duration::from_secs(900);

/// A client of one daemon. Each request opens its own connection.
#[derive(Debug, Clone)]
pub struct Client {
    socket: PathBuf,
}

/// Body of requests that need none.
#[derive(Serialize)]
struct Nothing {}

impl Client {
    /// For the daemon at this socket. Nothing is opened yet.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self {
            socket: socket.into(),
        }
    }

    /// The socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// All of the site.
    pub async fn status(&self) -> Result<SiteStatus, ApiError> {
        self.get("/v1/status").await
    }

    /// What the hosts of the site and of its peers are like.
    pub async fn facts(&self) -> Result<Facts, ApiError> {
        self.get("/v1/facts").await
    }

    /// Starts a guest.
    pub async fn guest_start(&self, guest: &GuestId, force: bool) -> Result<Done, ApiError> {
        self.post(&verb(guest, "start"), &StartRequest { force })
            .await
    }

    /// Stops a guest.
    pub async fn guest_stop(&self, guest: &GuestId) -> Result<Done, ApiError> {
        self.post(&verb(guest, "stop"), &Nothing {}).await
    }

    /// Where a guest's terminal is.
    pub async fn console(&self, guest: &GuestId) -> Result<ConsoleInfo, ApiError> {
        self.get(&verb(guest, "console")).await
    }

    /// The networks of a guest.
    pub async fn networks(&self, guest: &GuestId) -> Result<Networks, ApiError> {
        self.get(&verb(guest, "networks")).await
    }

    /// Has a guest's agent give an interface an address.
    pub async fn address(
        &self,
        guest: &GuestId,
        request: &AddressRequest,
    ) -> Result<Done, ApiError> {
        let body = serde_json::to_vec(request).expect("requests have no keys but strings");
        // The daemon says itself when time is up.
        let within = ADDRESS_WITHIN_MAX + ANSWER_WITHIN;
        let path = verb(guest, "address");
        understand(
            self.exchange_within(Method::POST, &path, body, within)
                .await?,
        )
    }

    /// Begins to replicate a guest.
    pub async fn protect(
        &self,
        guest: &GuestId,
        request: &ProtectRequest,
    ) -> Result<Run, ApiError> {
        self.post(&verb(guest, "protect"), request).await
    }

    /// Ends the replication of a guest.
    pub async fn unprotect(&self, guest: &GuestId, purge: bool) -> Result<Done, ApiError> {
        self.post(&verb(guest, "unprotect"), &UnprotectRequest { purge })
            .await
    }

    /// The recovery points of a guest.
    pub async fn points(&self, guest: &GuestId) -> Result<Points, ApiError> {
        self.get(&verb(guest, "points")).await
    }

    /// Resumes a guest here.
    pub async fn failover(
        &self,
        guest: &GuestId,
        request: &FailoverRequest,
    ) -> Result<Run, ApiError> {
        self.post(&verb(guest, "failover"), request).await
    }

    /// Resumes all members of a group here: one run a member.
    pub async fn failover_group(
        &self,
        group: &GroupId,
        request: &FailoverRequest,
    ) -> Result<Runs, ApiError> {
        let path = format!("/v1/groups/{group}/failover");
        self.post(&path, request).await
    }

    /// Ends the time in which a failover can be rolled back.
    pub async fn commit(&self, guest: &GuestId) -> Result<Done, ApiError> {
        self.post(&verb(guest, "commit"), &Nothing {}).await
    }

    /// Undoes a failover.
    pub async fn roll_back(&self, guest: &GuestId) -> Result<Done, ApiError> {
        self.post(&verb(guest, "rollback"), &Nothing {}).await
    }

    /// Moves a guest to another site.
    pub async fn move_guest(
        &self,
        guest: &GuestId,
        request: &MoveRequest,
    ) -> Result<Run, ApiError> {
        self.post(&verb(guest, "move"), request).await
    }

    /// Tries a failover with a clone.
    pub async fn test_failover(
        &self,
        guest: &GuestId,
        request: &DrillRequest,
    ) -> Result<Run, ApiError> {
        self.post(&verb(guest, "test-failover"), request).await
    }

    /// Ends the clone that a drill kept.
    pub async fn test_failover_stop(&self, guest: &GuestId) -> Result<Done, ApiError> {
        self.post(&verb(guest, "test-failover/stop"), &Nothing {})
            .await
    }

    /// Verifies a recovery point.
    pub async fn verify(&self, guest: &GuestId, point: Option<Epoch>) -> Result<Run, ApiError> {
        self.post(&verb(guest, "verify"), &VerifyRequest { point })
            .await
    }

    /// Exports the disks of a recovery point.
    pub async fn export(&self, guest: &GuestId, request: &ExportRequest) -> Result<Run, ApiError> {
        self.post(&verb(guest, "export"), request).await
    }

    /// Ends the export of a guest.
    pub async fn export_stop(&self, guest: &GuestId) -> Result<Done, ApiError> {
        self.post(&verb(guest, "export/stop"), &Nothing {}).await
    }

    /// The exports of the site.
    pub async fn exports(&self) -> Result<Exports, ApiError> {
        self.get("/v1/exports").await
    }

    /// Figures of a journal.
    pub async fn journal_stat(&self, guest: &GuestId) -> Result<JournalStat, ApiError> {
        self.get(&verb(guest, "journal")).await
    }

    /// Checks a journal.
    pub async fn journal_check(&self, guest: &GuestId) -> Result<Run, ApiError> {
        self.post(&verb(guest, "journal/check"), &Nothing {}).await
    }

    /// Makes the catalogue of a journal anew.
    pub async fn journal_rebuild(&self, guest: &GuestId) -> Result<Run, ApiError> {
        self.post(&verb(guest, "journal/rebuild"), &Nothing {})
            .await
    }

    /// Writes a seed of a guest.
    pub async fn seed_export(
        &self,
        guest: &GuestId,
        request: &SeedRequest,
    ) -> Result<Run, ApiError> {
        self.post(&verb(guest, "seed/export"), request).await
    }

    /// Lays a seed under the first protection of a guest.
    pub async fn seed_import(
        &self,
        guest: &GuestId,
        request: &SeedRequest,
    ) -> Result<Run, ApiError> {
        self.post(&verb(guest, "seed/import"), request).await
    }

    /// A run as it is now.
    pub async fn run(&self, id: &RunId) -> Result<Run, ApiError> {
        let plain = |b: u8| b.is_ascii_alphanumeric() || b == b'-';
        if id.0.is_empty() || !id.0.bytes().all(plain) {
            let message = format!("{:?} is no run: ids are letters, digits and '-'", id.0);
            return Err(ApiError::new(Reason::NoSuchRun, message));
        }
        self.get(&format!("/v1/runs/{id}")).await
    }

    /// The runs that are remembered.
    pub async fn runs(&self) -> Result<Runs, ApiError> {
        self.get("/v1/runs").await
    }

    /// Makes a checkpoint now.
    pub async fn checkpoint(
        &self,
        guest: &GuestId,
        request: &CheckpointRequest,
    ) -> Result<Checkpoint, ApiError> {
        let body = serde_json::to_vec(request).expect("requests have no keys but strings");
        let path = verb(guest, "checkpoint");
        let asking = self.exchange_within(Method::POST, &path, body, CHECKPOINT_WITHIN);
        understand(asking.await?)
    }

    /// What happened after this event, oldest first; not all at once.
    pub async fn events(&self, after: u64) -> Result<Events, ApiError> {
        self.get(&format!("/v1/events?after={after}")).await
    }

    /// Overrides the limit of what is sent to a peer, or ends that.
    pub async fn bandwidth(
        &self,
        peer: &SiteId,
        request: &BandwidthRequest,
    ) -> Result<Bandwidth, ApiError> {
        self.post(&format!("/v1/peers/{peer}/bandwidth"), request)
            .await
    }

    /// Reads the configuration again.
    pub async fn reload(&self) -> Result<Reloaded, ApiError> {
        self.post("/v1/reload", &Nothing {}).await
    }

    /// The text of `/metrics`.
    pub async fn metrics(&self) -> Result<String, ApiError> {
        let (_, body) = self.exchange(Method::GET, "/metrics", Vec::new()).await?;
        String::from_utf8(body).map_err(|_| strange("the metrics are no text"))
    }

    async fn get<T: Document + DeserializeOwned>(&self, path: &str) -> Result<T, ApiError> {
        let answer = self.exchange(Method::GET, path, Vec::new()).await?;
        understand(answer)
    }

    async fn post<T: Document + DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, ApiError> {
        let body = serde_json::to_vec(body).expect("requests have no keys but strings");
        let answer = self.exchange(Method::POST, path, body).await?;
        understand(answer)
    }

    async fn exchange(
        &self,
        method: Method,
        path: &str,
        body: Vec<u8>,
    ) -> Result<(bool, Vec<u8>), ApiError> {
        self.exchange_within(method, path, body, ANSWER_WITHIN)
            .await
    }

    async fn exchange_within(
        &self,
        method: Method,
        path: &str,
        body: Vec<u8>,
        within: Duration,
    ) -> Result<(bool, Vec<u8>), ApiError> {
        let exchange = tokio::time::timeout(within, self.talk(method, path, body));
        exchange.await.unwrap_or_else(|_| {
            let seconds = within.as_secs();
            Err(self.unreachable(format!("no answer within {seconds} s")))
        })
    }

    /// One request over one connection: whether it succeeded, and the answer's body.
    async fn talk(
        &self,
        method: Method,
        path: &str,
        body: Vec<u8>,
    ) -> Result<(bool, Vec<u8>), ApiError> {
        let stream = UnixStream::connect(&self.socket)
            .await
            .map_err(|error| self.unreachable(error))?;
        let handshake = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await;
        let (mut sender, connection) = handshake.map_err(|error| self.unreachable(error))?;
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, "lifeboat")
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(body)))
            .expect("paths are made of checked names");
        let talk = async {
            let response = sender.send_request(request).await;
            let response = response.map_err(|error| self.unreachable(error))?;
            let success = response.status().is_success();
            let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX).collect();
            let body = body.await.map_err(|error| self.unreachable(error))?;
            Ok((success, body.to_bytes().into()))
        };
        tokio::pin!(talk, connection);
        // The connection does the work of the request; when it ends first, the request knows why.
        tokio::select! {
            biased;
            done = &mut talk => done,
            _ = &mut connection => talk.await,
        }
    }

    fn unreachable(&self, why: impl std::fmt::Display) -> ApiError {
        ApiError::new(
            Reason::DaemonUnreachable,
            format!(
                "the daemon at {} cannot be reached: {why}",
                self.socket.display()
            ),
        )
        .hint("is \"lifeboat site\" running? --socket or -c says which one is meant")
    }
}

fn verb(guest: &GuestId, verb: &str) -> String {
    format!("/v1/guests/{guest}/{verb}")
}

fn strange(what: impl std::fmt::Display) -> ApiError {
    ApiError::new(
        Reason::Internal,
        format!("the daemon's answer cannot be understood: {what}"),
    )
    .hint("use the command line of the same version as the daemon")
}

fn understand<T: Document + DeserializeOwned>(
    (success, body): (bool, Vec<u8>),
) -> Result<T, ApiError> {
    fn open<T: Document + DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
        let envelope: Envelope<T> = serde_json::from_slice(body).map_err(strange)?;
        if envelope.schema != T::SCHEMA {
            let (is, wanted) = (envelope.schema, T::SCHEMA);
            return Err(strange(format!("it is {is:?}, wanted was {wanted:?}")));
        }
        Ok(envelope.body)
    }
    if success {
        open(&body)
    } else {
        Err(open::<ApiError>(&body)?)
    }
}
