//! The server end of the admin API.
//!
//! | Method | Path | Body | Answer |
//! |---|---|---|---|
//! | GET | `/v1/status` | | `lifeboat.status/v1` |
//! | GET | `/v1/facts` | | `lifeboat.facts/v1` |
//! | POST | `/v1/guests/G/start` | `{"force": bool}` | `lifeboat.done/v1` |
//! | POST | `/v1/guests/G/stop` | | `lifeboat.done/v1` |
//! | GET | `/v1/guests/G/console` | | `lifeboat.console/v1` |
//! | GET | `/v1/guests/G/networks` | | `lifeboat.networks/v1` |
//! | POST | `/v1/guests/G/address` | `AddressRequest` | `lifeboat.done/v1` |
//! | POST | `/v1/guests/G/protect` | `ProtectRequest` | `lifeboat.run/v1`, 202 |
//! | POST | `/v1/guests/G/unprotect` | `{"purge": bool}` | `lifeboat.done/v1` |
//! | GET | `/v1/guests/G/points` | | `lifeboat.points/v1` |
//! | POST | `/v1/guests/G/failover` | `FailoverRequest` | `lifeboat.run/v1`, 202 |
//! | POST | `/v1/groups/NAME/failover` | `FailoverRequest` | `lifeboat.runs/v1`, 202 |
//! | POST | `/v1/guests/G/commit` | - | `lifeboat.done/v1` |
//! | POST | `/v1/guests/G/rollback` | - | `lifeboat.done/v1` |
//! | POST | `/v1/guests/G/move` | `MoveRequest` | `lifeboat.run/v1`, 202 |
//! | POST | `/v1/guests/G/verify` | `{"point": N}` | `lifeboat.run/v1`, 202 |
//! | POST | `/v1/guests/G/test-failover` | `DrillRequest` | `lifeboat.run/v1`, 202 |
//! | POST | `/v1/guests/G/test-failover/stop` | | `lifeboat.done/v1` |
//! | POST | `/v1/guests/G/checkpoint` | `CheckpointRequest` | `lifeboat.checkpoint/v1` |
//! | POST | `/v1/guests/G/export` | `ExportRequest` | `lifeboat.run/v1`, 202 |
//! | POST | `/v1/guests/G/export/stop` | | `lifeboat.done/v1` |
//! | POST | `/v1/guests/G/seed/export`, `.../import` | `SeedRequest` | `lifeboat.run/v1`, 202 |
//! | GET | `/v1/exports` | | `lifeboat.exports/v1` |
//! | GET | `/v1/guests/G/journal` | | `lifeboat.journal_stat/v1` |
//! | POST | `/v1/guests/G/journal/check`, `.../rebuild` | | `lifeboat.run/v1`, 202 |
//! | GET | `/v1/runs`, `/v1/runs/ID` | | `lifeboat.runs/v1`, `lifeboat.run/v1` |
//! | GET | `/v1/events?after=N` | | `lifeboat.events/v1` |
//! | POST | `/v1/peers/SITE/bandwidth` | `BandwidthRequest` | `lifeboat.bandwidth/v1` |
//! | POST | `/v1/reload` | | `lifeboat.reload/v1` |
//! | GET | `/metrics`, `/livez`, `/readyz` | | text; these three also over TCP |
//! | GET | `/` | | the status page; only over TCP |
//!
//! An error is a `lifeboat.error/v1` with a fitting HTTP status. Bodies are bounded. A verb that
//! changes something runs in a task of its own, so that a client that goes away does not stop it
//! half way; who asked is logged.

use std::future::Future;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Bytes;
use axum::extract::connect_info::Connected;
use axum::extract::rejection::QueryRejection;
use axum::extract::{ConnectInfo, DefaultBodyLimit, Path, Query, Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::serve::IncomingStream;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::net::{TcpListener, UnixListener};
use tokio::time::timeout;

use super::backend::Backend;
use super::bandwidth::BandwidthRequest;
use super::checkpoint::CheckpointRequest;
use super::codes::Reason;
use super::events::EventsRequest;
use super::page::{self, History};
use super::requests::{StartRequest, UnprotectRequest, VerifyRequest};
use super::socket::AdminSocket;
use super::types::{
    AddressRequest, ApiError, Document, DrillRequest, Envelope, ExportRequest, FailoverRequest,
    MoveRequest, ProtectRequest, Run, RunId, SeedRequest,
};
use crate::ids::{GroupId, GuestId, NameError, SiteId};
use crate::metrics::Metrics;

/// How long it is waited for a site that is being started.
const STARTED_WITHIN: Duration = Duration::from_secs(5);

/// Largest body of a request.
const BODY_BYTES_MAX: usize = 64 << 10;
/// Content type of Prometheus' text format.
const METRICS_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Who is at the other end of the unix socket, as the kernel says.
#[derive(Debug, Clone, Copy)]
struct Caller {
    uid: Option<u32>,
    pid: Option<i32>,
}

impl Connected<IncomingStream<'_, UnixListener>> for Caller {
    fn connect_info(stream: IncomingStream<'_, UnixListener>) -> Self {
        let cred = stream.io().peer_cred().ok();
        Self {
            uid: cred.map(|cred| cred.uid()),
            pid: cred.and_then(|cred| cred.pid()),
        }
    }
}

struct Site<B> {
    backend: Arc<B>,
    metrics: Metrics,
}

impl<B> Clone for Site<B> {
    fn clone(&self) -> Self {
        Self {
            backend: Arc::clone(&self.backend),
            metrics: self.metrics.clone(),
        }
    }
}

/// Serves the admin API on `socket` until `stop` is ready and what was asked is answered.
pub async fn serve_admin<B: Backend>(
    socket: AdminSocket,
    backend: Arc<B>,
    metrics: Metrics,
    stop: impl Future<Output = ()> + Send + 'static,
) -> std::io::Result<()> {
    let app = admin_router(Site { backend, metrics });
    let (listener, _remove_at_end) = socket.into_parts();
    axum::serve(
        listener,
        app.into_make_service_with_connect_info::<Caller>(),
    )
    .with_graceful_shutdown(stop)
    .await
}

/// Serves the status page, `/metrics`, `/livez` and `/readyz` on `listener` until `stop` is ready.
pub async fn serve_public<B: Backend>(
    listener: TcpListener,
    backend: Arc<B>,
    metrics: Metrics,
    stop: impl Future<Output = ()> + Send + 'static,
) -> std::io::Result<()> {
    let history = History::default();
    let keeping = history.clone().keep(Arc::clone(&backend));
    let site = Site { backend, metrics };
    let app = public_routes()
        .route(
            "/",
            get(async move |State(site): State<Site<B>>| {
                let status = site.backend.status().await;
                match status {
                    Ok(status) => (page::HEADERS, history.page(&status)).into_response(),
                    Err(error) => {
                        let text = format!("{error}\n");
                        (StatusCode::SERVICE_UNAVAILABLE, text).into_response()
                    }
                }
            }),
        )
        .fallback(nothing)
        .with_state(site);
    let serving = axum::serve(listener, app).with_graceful_shutdown(stop);
    tokio::select! {
        served = serving => served,
        never = keeping => match never {},
    }
}

fn public_routes<B: Backend>() -> Router<Site<B>> {
    Router::new()
        .route(
            "/metrics",
            get(async |State(site): State<Site<B>>| {
                (
                    [(header::CONTENT_TYPE, METRICS_TYPE)],
                    site.metrics.render(),
                )
            }),
        )
        .route("/livez", get(async || "ok\n"))
        .route(
            "/readyz",
            get(
                async |State(site): State<Site<B>>| match site.backend.ready().await {
                    Ok(()) => (StatusCode::OK, "ok\n".to_owned()),
                    Err(error) => (StatusCode::SERVICE_UNAVAILABLE, format!("{error}\n")),
                },
            ),
        )
}

fn admin_router<B: Backend>(site: Site<B>) -> Router {
    let verbs = Router::new()
        .route("/v1/status", get(status))
        .route("/v1/facts", get(facts))
        .route("/v1/guests/{guest}/start", post(guest_start))
        .route("/v1/guests/{guest}/stop", post(guest_stop))
        .route("/v1/guests/{guest}/console", get(console))
        .route("/v1/guests/{guest}/networks", get(networks))
        .route("/v1/guests/{guest}/address", post(address))
        .route("/v1/guests/{guest}/protect", post(protect))
        .route("/v1/guests/{guest}/unprotect", post(unprotect))
        .route("/v1/guests/{guest}/commit", post(commit))
        .route("/v1/guests/{guest}/rollback", post(roll_back))
        .route("/v1/guests/{guest}/points", get(points))
        .route("/v1/guests/{guest}/failover", post(failover))
        .route("/v1/groups/{group}/failover", post(failover_group))
        .route("/v1/guests/{guest}/move", post(move_guest))
        .route("/v1/guests/{guest}/test-failover", post(test_failover))
        .route(
            "/v1/guests/{guest}/test-failover/stop",
            post(test_failover_stop),
        )
        .route("/v1/guests/{guest}/verify", post(verify))
        .route("/v1/guests/{guest}/checkpoint", post(checkpoint))
        .route("/v1/guests/{guest}/export", post(export))
        .route("/v1/guests/{guest}/export/stop", post(export_stop))
        .route("/v1/guests/{guest}/seed/export", post(seed_export))
        .route("/v1/guests/{guest}/seed/import", post(seed_import))
        .route("/v1/exports", get(exports))
        .route("/v1/guests/{guest}/journal", get(journal_stat))
        .route("/v1/guests/{guest}/journal/check", post(journal_check))
        .route("/v1/guests/{guest}/journal/rebuild", post(journal_rebuild))
        .route("/v1/runs", get(runs))
        .route("/v1/runs/{id}", get(run))
        .route("/v1/events", get(events))
        .route("/v1/peers/{peer}/bandwidth", post(bandwidth))
        .route("/v1/reload", post(reload))
        .route_layer(from_fn_with_state(site.clone(), once_started));
    public_routes()
        .merge(verbs)
        .fallback(nothing)
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .with_state(site)
}

/// A site that has just been started does not know its guests yet: whoever asks waits for a moment.
async fn once_started<B: Backend>(
    State(site): State<Site<B>>,
    request: Request,
    next: Next,
) -> Response {
    // One that takes longer says what it knows.
    let _ = timeout(STARTED_WITHIN, site.backend.started()).await;
    next.run(request).await
}

async fn nothing<B: Backend>(State(site): State<Site<B>>) -> Response {
    let error = ApiError::new(Reason::Usage, "there is no such page");
    site.answer::<Run>("other", Err(error), StatusCode::OK)
}

impl<B: Backend> Site<B> {
    /// The answer to a request, counted.
    fn answer<T: Document + Serialize>(
        &self,
        route: &'static str,
        result: Result<T, ApiError>,
        success: StatusCode,
    ) -> Response {
        let (status, body) = match result {
            Ok(document) => (success, to_json(document)),
            Err(error) => {
                let status = StatusCode::from_u16(error.reason.http_status());
                let status = status.expect("the table of reasons holds HTTP statuses");
                (status, to_json(error))
            }
        };
        self.metrics.admin_request(route, status.as_u16());
        (status, [(header::CONTENT_TYPE, "application/json")], body).into_response()
    }

    /// A verb that changes something: in a task of its own, logged.
    async fn verb<T, F, N>(
        &self,
        route: &'static str,
        caller: Caller,
        name: &str,
        success: StatusCode,
        work: impl FnOnce(Arc<B>, N) -> F,
    ) -> Response
    where
        N: FromStr<Err = NameError>,
        T: Document + Serialize + Send + 'static,
        F: Future<Output = Result<T, ApiError>> + Send + 'static,
    {
        let named = match named(name) {
            Ok(named) => named,
            Err(error) => return self.answer::<T>(route, Err(error), success),
        };
        tracing::info!(
            name,
            route,
            uid = caller.uid,
            pid = caller.pid,
            "asked by the operator"
        );
        let task = tokio::spawn(work(Arc::clone(&self.backend), named));
        let result = task.await.unwrap_or_else(|error| {
            tracing::error!(route, %error, "an admin verb panicked");
            Err(
                ApiError::new(Reason::Internal, "the daemon failed at this request")
                    .hint("its log says more"),
            )
        });
        self.answer(route, result, success)
    }
}

fn to_json<T: Document + Serialize>(document: T) -> Vec<u8> {
    serde_json::to_vec(&Envelope::new(document)).expect("documents have no keys but strings")
}

fn named<N: FromStr<Err = NameError>>(name: &str) -> Result<N, ApiError> {
    let parsed = name.parse();
    parsed.map_err(|error: NameError| ApiError::new(Reason::Usage, error.to_string()))
}

/// The body, or its default when there is none.
fn body<T: DeserializeOwned + Default>(bytes: &Bytes) -> Result<T, ApiError> {
    if bytes.is_empty() {
        return Ok(T::default());
    }
    needed(bytes)
}

/// The body, which has to be there.
fn needed<T: DeserializeOwned>(bytes: &Bytes) -> Result<T, ApiError> {
    serde_json::from_slice(bytes)
        .map_err(|error| ApiError::new(Reason::Usage, format!("the request's body: {error}")))
}

/// A handler that only reads. It names the route that it is counted under.
macro_rules! read {
    ($name:ident, $route:literal, |$backend:ident| $call:expr) => {
        async fn $name<B: Backend>(State(site): State<Site<B>>) -> Response {
            let $backend = &site.backend;
            let result = $call.await;
            site.answer($route, result, StatusCode::OK)
        }
    };
    ($name:ident, $route:literal, |$backend:ident, $guest:ident| $call:expr) => {
        async fn $name<B: Backend>(
            State(site): State<Site<B>>,
            Path(guest): Path<String>,
        ) -> Response {
            let $backend = &site.backend;
            let result = match named::<GuestId>(&guest) {
                Ok($guest) => $call.await,
                Err(error) => Err(error),
            };
            site.answer($route, result, StatusCode::OK)
        }
    };
}

/// A handler of a verb for one guest.
macro_rules! verb {
    ($name:ident, $route:literal, $success:ident, needed $body:ty, $($work:tt)+) => {
        verb!(@ $name, $route, $success, needed, $body, $($work)+);
    };
    ($name:ident, $route:literal, $success:ident, $body:ty, $($work:tt)+) => {
        verb!(@ $name, $route, $success, body, $body, $($work)+);
    };
    (@ $name:ident, $route:literal, $success:ident, $parse:ident, $body:ty,
     |$backend:ident, $guest:ident, $request:ident| $call:expr) => {
        async fn $name<B: Backend>(
            State(site): State<Site<B>>,
            ConnectInfo(caller): ConnectInfo<Caller>,
            Path(guest): Path<String>,
            bytes: Bytes,
        ) -> Response {
            let request = $parse::<$body>(&bytes);
            let work = move |$backend: Arc<B>, $guest: GuestId| async move {
                let $request = request?;
                $call.await
            };
            let success = StatusCode::$success;
            site.verb($route, caller, &guest, success, work).await
        }
    };
}

/// Body of verbs that need none; `{}` is taken too.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Nothing {}

read!(status, "/v1/status", |backend| backend.status());
read!(facts, "/v1/facts", |backend| backend.facts());
read!(runs, "/v1/runs", |backend| backend.runs());
read!(exports, "/v1/exports", |backend| backend.exports());
read!(console, "/v1/guests/{guest}/console", |backend, guest| {
    backend.console(&guest)
});
read!(networks, "/v1/guests/{guest}/networks", |backend, guest| {
    backend.networks(&guest)
});
read!(points, "/v1/guests/{guest}/points", |backend, guest| {
    backend.points(&guest)
});
read!(
    journal_stat,
    "/v1/guests/{guest}/journal",
    |backend, guest| backend.journal_stat(&guest)
);
verb!(
    guest_start,
    "/v1/guests/{guest}/start",
    OK,
    StartRequest,
    |backend, guest, request| backend.guest_start(&guest, request.force)
);
verb!(
    guest_stop,
    "/v1/guests/{guest}/stop",
    OK,
    Nothing,
    |backend, guest, _request| backend.guest_stop(&guest)
);
verb!(
    protect,
    "/v1/guests/{guest}/protect",
    ACCEPTED,
    ProtectRequest,
    |backend, guest, request| backend.protect(&guest, request)
);
verb!(
    unprotect,
    "/v1/guests/{guest}/unprotect",
    OK,
    UnprotectRequest,
    |backend, guest, request| backend.unprotect(&guest, request.purge)
);
verb!(
    failover,
    "/v1/guests/{guest}/failover",
    ACCEPTED,
    FailoverRequest,
    |backend, guest, request| backend.failover(&guest, request)
);
verb!(
    commit,
    "/v1/guests/{guest}/commit",
    OK,
    Nothing,
    |backend, guest, _request| backend.commit(&guest)
);
verb!(
    roll_back,
    "/v1/guests/{guest}/rollback",
    OK,
    Nothing,
    |backend, guest, _request| backend.roll_back(&guest)
);
verb!(
    move_guest,
    "/v1/guests/{guest}/move",
    ACCEPTED,
    MoveRequest,
    |backend, guest, request| backend.move_guest(&guest, request)
);
verb!(
    test_failover,
    "/v1/guests/{guest}/test-failover",
    ACCEPTED,
    DrillRequest,
    |backend, guest, request| backend.test_failover(&guest, request)
);
verb!(
    test_failover_stop,
    "/v1/guests/{guest}/test-failover/stop",
    OK,
    Nothing,
    |backend, guest, _request| backend.test_failover_stop(&guest)
);
verb!(
    verify,
    "/v1/guests/{guest}/verify",
    ACCEPTED,
    VerifyRequest,
    |backend, guest, request| backend.verify(&guest, request.point)
);
verb!(
    export,
    "/v1/guests/{guest}/export",
    ACCEPTED,
    ExportRequest,
    |backend, guest, request| backend.export(&guest, request)
);
verb!(
    export_stop,
    "/v1/guests/{guest}/export/stop",
    OK,
    Nothing,
    |backend, guest, _request| backend.export_stop(&guest)
);
verb!(
    checkpoint,
    "/v1/guests/{guest}/checkpoint",
    OK,
    CheckpointRequest,
    |backend, guest, request| backend.checkpoint(&guest, request)
);
verb!(
    address,
    "/v1/guests/{guest}/address",
    OK,
    needed AddressRequest,
    |backend, guest, request| backend.address(&guest, request)
);
verb!(
    seed_export,
    "/v1/guests/{guest}/seed/export",
    ACCEPTED,
    needed SeedRequest,
    |backend, guest, request| backend.seed_export(&guest, request)
);
verb!(
    seed_import,
    "/v1/guests/{guest}/seed/import",
    ACCEPTED,
    needed SeedRequest,
    |backend, guest, request| backend.seed_import(&guest, request)
);
verb!(
    journal_check,
    "/v1/guests/{guest}/journal/check",
    ACCEPTED,
    Nothing,
    |backend, guest, _request| backend.journal_check(&guest)
);
verb!(
    journal_rebuild,
    "/v1/guests/{guest}/journal/rebuild",
    ACCEPTED,
    Nothing,
    |backend, guest, _request| backend.journal_rebuild(&guest)
);

async fn failover_group<B: Backend>(
    State(site): State<Site<B>>,
    ConnectInfo(caller): ConnectInfo<Caller>,
    Path(group): Path<String>,
    bytes: Bytes,
) -> Response {
    let request = body::<FailoverRequest>(&bytes);
    let work = move |backend: Arc<B>, group: GroupId| async move {
        backend.failover_group(&group, request?).await
    };
    let (route, success) = ("/v1/groups/{group}/failover", StatusCode::ACCEPTED);
    site.verb(route, caller, &group, success, work).await
}

async fn run<B: Backend>(State(site): State<Site<B>>, Path(id): Path<String>) -> Response {
    let result = site.backend.run(&RunId(id)).await;
    site.answer("/v1/runs/{id}", result, StatusCode::OK)
}

async fn events<B: Backend>(
    State(site): State<Site<B>>,
    query: Result<Query<EventsRequest>, QueryRejection>,
) -> Response {
    let result = match query {
        Ok(Query(request)) => site.backend.events(request.after).await,
        Err(error) => Err(ApiError::new(Reason::Usage, error.to_string())),
    };
    site.answer("/v1/events", result, StatusCode::OK)
}

async fn bandwidth<B: Backend>(
    State(site): State<Site<B>>,
    ConnectInfo(caller): ConnectInfo<Caller>,
    Path(peer): Path<String>,
    bytes: Bytes,
) -> Response {
    tracing::info!(
        peer,
        uid = caller.uid,
        pid = caller.pid,
        "bandwidth asked by the operator"
    );
    let result = match (named::<SiteId>(&peer), body::<BandwidthRequest>(&bytes)) {
        (Ok(peer), Ok(request)) => site.backend.bandwidth(&peer, request).await,
        (Err(error), _) | (_, Err(error)) => Err(error),
    };
    site.answer("/v1/peers/{peer}/bandwidth", result, StatusCode::OK)
}

async fn reload<B: Backend>(
    State(site): State<Site<B>>,
    ConnectInfo(caller): ConnectInfo<Caller>,
) -> Response {
    tracing::info!(
        uid = caller.uid,
        pid = caller.pid,
        "reload asked by the operator"
    );
    let result = site.backend.reload().await;
    site.answer("/v1/reload", result, StatusCode::OK)
}
