//! The server by raw HTTP: what a client of ours would never send, and who may see what.

use std::path::Path;
use std::sync::Arc;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixStream};

use super::client::Client;
use super::codes::{EXIT_CODES, Reason};
use super::fake::Fake;
use super::server::{serve_admin, serve_public};
use super::socket::AdminSocket;
use super::types::*;

/// Status and body of the answer to one request.
async fn talk(
    mut stream: impl tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
    request: &str,
    body: &[u8],
) -> (u16, String) {
    let head = format!(
        "{request} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    // The server may answer and close before it has read a body that is too large.
    let _ = stream.write_all(body).await;
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    let answer = String::from_utf8(answer).unwrap();
    let status = answer.split(' ').nth(1).unwrap().parse().unwrap();
    let (_, body) = answer.split_once("\r\n\r\n").unwrap();
    (status, body.to_owned())
}

async fn admin(path: &Path, request: &str, body: &[u8]) -> (u16, String) {
    talk(UnixStream::connect(path).await.unwrap(), request, body).await
}

fn serve(dir: &Path) -> (Arc<Fake>, std::path::PathBuf) {
    let path = dir.join("admin.sock");
    let fake = Fake::new();
    let socket = AdminSocket::bind(&path).unwrap();
    let metrics = fake.metrics.clone();
    tokio::spawn(serve_admin(
        socket,
        fake.clone(),
        metrics,
        std::future::pending(),
    ));
    (fake, path)
}

#[tokio::test]
async fn strange_requests_are_refused_with_a_reason() {
    let dir = tempfile::tempdir().unwrap();
    let (fake, path) = serve(dir.path());
    let huge = vec![b' '; 1 << 20];
    let cases: &[(&str, &[u8], u16, &str)] = &[
        ("POST /v1/guests/db1/failover", b"{", 400, "usage"),
        ("POST /v1/guests/db1/failover", b"[1,2]", 400, "usage"),
        (
            "POST /v1/guests/db1/failover",
            b"{\"points\":1}",
            400,
            "usage",
        ),
        (
            "POST /v1/guests/db1/failover",
            b"{\"point\":-1}",
            400,
            "usage",
        ),
        ("POST /v1/guests/db1/failover", b"\xff\xfe", 400, "usage"),
        ("POST /v1/guests/db1/stop", b"{\"x\":1}", 400, "usage"),
        ("POST /v1/guests/UPPER/stop", b"", 400, "usage"),
        ("POST /v1/guests/%2e%2e%2fx/stop", b"", 400, "usage"),
        ("GET /v1/guests/nobody/points", b"", 404, "no_such_guest"),
        ("GET /v1/runs/%00", b"", 404, "no_such_run"),
        ("GET /v1/nothing", b"", 400, "usage"),
        ("POST /v1/guests/torn1/stop", b"", 500, "internal"),
    ];
    for (request, body, status, reason) in cases {
        let (found, text) = admin(&path, request, body).await;
        assert_eq!(found, *status, "{request}: {text}");
        let error: Envelope<ApiError> = serde_json::from_str(&text).unwrap();
        assert_eq!(error.schema, ApiError::SCHEMA);
        assert_eq!(error.body.reason.as_str(), *reason, "{request}: {text}");
    }
    let (status, _) = admin(&path, "POST /v1/guests/db1/failover", &huge).await;
    assert_eq!(status, 413, "a body has a limit");
    let (status, _) = admin(&path, "DELETE /v1/status", b"").await;
    assert_eq!(status, 405);
    // All of it was counted by route, and no path of a request became a label.
    let metrics = fake.metrics.render();
    let line = "lifeboat_admin_requests_total{code=\"400\",route=\"/v1/guests/{guest}/stop\"} 3";
    assert!(metrics.contains(line), "{metrics}");
    assert!(!metrics.contains("nobody") && !metrics.contains("nothing"));
}

#[tokio::test]
async fn tcp_serves_four_pages_and_nothing_else() {
    let fake = Fake::new();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let server = tokio::spawn(serve_public(
        listener,
        fake.clone(),
        fake.metrics.clone(),
        async move { drop(stopped.await) },
    ));
    let get = async |request: &str| {
        let stream = TcpStream::connect(address).await.unwrap();
        talk(stream, request, b"").await
    };
    let (status, text) = get("GET /metrics").await;
    assert_eq!(status, 200);
    assert!(text.contains("lifeboat_build_info"));
    assert_eq!(get("GET /livez").await, (200, "ok\n".to_owned()));
    let (status, text) = get("GET /").await;
    assert_eq!(status, 200);
    assert!(text.contains("<h1>Lifeboat · site-a</h1>"), "{text}");
    let (status, text) = get("GET /readyz").await;
    assert_eq!(
        (status, text.as_str()),
        (503, "the journal of torn1 is not open\n")
    );
    assert_eq!(get("POST /").await.0, 405);
    for request in [
        "GET /v1/status",
        "POST /v1/guests/db1/stop",
        "POST /v1/reload",
    ] {
        let (status, text) = get(request).await;
        assert_eq!(status, 400, "{request}: {text}");
        assert!(!text.contains("site-a"), "{request}: {text}");
    }
    stop.send(()).unwrap();
    server.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_client_that_goes_away_does_not_stop_what_it_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let (_, path) = serve(dir.path());
    let client = Client::new(&path);
    let mut stream = UnixStream::connect(&path).await.unwrap();
    let request = "POST /v1/guests/slow1/verify HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n";
    stream.write_all(request.as_bytes()).await.unwrap();
    drop(stream);
    // The run is begun, sooner or later, and holds its guest.
    let runs = loop {
        let runs = client.runs().await.unwrap().runs;
        if !runs.is_empty() {
            break runs;
        }
        tokio::task::yield_now().await;
    };
    assert_eq!(runs[0].state, RunStatus::Running);
    let busy = client.verify(&"slow1".parse().unwrap(), None).await;
    assert_eq!(busy.unwrap_err().reason, Reason::Busy);
}

#[tokio::test]
async fn the_server_ends_and_its_socket_goes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("admin.sock");
    let fake = Fake::new();
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let socket = AdminSocket::bind(&path).unwrap();
    let server = tokio::spawn(serve_admin(
        socket,
        fake.clone(),
        fake.metrics.clone(),
        async move { drop(stopped.await) },
    ));
    Client::new(&path).status().await.unwrap();
    stop.send(()).unwrap();
    server.await.unwrap().unwrap();
    assert!(!path.exists());
    let error = Client::new(&path).status().await.unwrap_err();
    assert_eq!(error.reason, Reason::DaemonUnreachable);
}

#[tokio::test]
async fn documents_survive_the_wire() {
    let dir = tempfile::tempdir().unwrap();
    let (fake, path) = serve(dir.path());
    let client = Client::new(&path);
    use super::backend::Backend;
    assert_eq!(client.status().await.unwrap(), fake.status().await.unwrap());
    let guest = "db1".parse().unwrap();
    assert_eq!(
        client.points(&guest).await.unwrap(),
        fake.points(&guest).await.unwrap()
    );
    assert_eq!(
        client.journal_stat(&guest).await.unwrap(),
        fake.journal_stat(&guest).await.unwrap()
    );
    assert_eq!(client.reload().await.unwrap(), fake.reload().await.unwrap());
    assert!(client.metrics().await.unwrap().contains("guest=\"db1\""));
}

#[test]
fn readers_ignore_what_they_do_not_know() {
    let text = r#"{"schema":"lifeboat.error/v1","code":4,"reason":"brand_new","message":"m",
                   "hint":null,"later":{"a":[1]}}"#;
    let error: Envelope<ApiError> = serde_json::from_str(text).unwrap();
    assert_eq!(error.body.reason, Reason::Other);
    assert_eq!(error.body.code, 4);
}

#[test]
fn reasons_have_words_statuses_and_exit_codes_of_the_table() {
    let mut words = std::collections::BTreeSet::new();
    for reason in Reason::ALL {
        assert!(words.insert(reason.as_str()), "{reason:?} shares its word");
        let json = serde_json::to_value(reason).unwrap();
        assert_eq!(json, reason.as_str());
        let parsed: Reason = serde_json::from_value(json).unwrap();
        assert_eq!(parsed, *reason);
        assert!((400..600).contains(&reason.http_status()));
        assert!(
            EXIT_CODES
                .iter()
                .any(|(code, _)| *code == reason.exit_code())
        );
    }
}

#[test]
fn schemas_are_named_and_numbered() {
    let mut all: Vec<&str> = SCHEMAS.to_vec();
    all.extend(crate::cli::verbs::SCHEMAS);
    all.extend(crate::control::facts::SCHEMAS);
    all.extend(crate::cli::config::SCHEMAS);
    all.extend(crate::cli::evacuate::SCHEMAS);
    all.extend(crate::cli::plan::SCHEMAS);
    all.extend(crate::cli::check::SCHEMAS);
    all.extend(crate::cli::pki::SCHEMAS);
    all.extend(crate::cli::doctor::SCHEMAS);
    all.extend(crate::cli::balance::SCHEMAS);
    all.extend(crate::cli::estimate::SCHEMAS);
    all.extend(crate::cli::bundle::SCHEMAS);
    all.extend(crate::cli::manual::SCHEMAS);
    let unique: std::collections::BTreeSet<_> = all.iter().collect();
    assert_eq!(unique.len(), all.len());
    for schema in all {
        let name = schema
            .strip_prefix("lifeboat.")
            .and_then(|s| s.strip_suffix("/v1"));
        let name = name.unwrap_or_else(|| panic!("{schema} is named otherwise"));
        assert!(
            name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_'),
            "{schema}"
        );
    }
}
