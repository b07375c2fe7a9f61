//! Links over loopback sockets with generated certificates, and over in-memory streams with paused
//! time.

mod hostile;
mod identity;
mod joins;
mod reload;
mod streams;
mod striped;

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;

use super::testpki::site;
use super::*;
use crate::clock::{Env, Timestamp};
use crate::wire::handshake::{HandshakeError, Introduction, as_primary, as_standby};
use crate::wire::link::{Dialer, HandshakeFailure, LinkError, LinkRx, LinkTx};
use crate::wire::message::{HelloReply, ToPrimary, ToStandby};

/// Long enough that only a hang reaches it.
const LONG: Duration = Duration::from_secs(60);

/// Fails the test instead of hanging it.
async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(LONG, what).await.expect("it hangs")
}

struct Standby {
    listener: TlsListener,
    refused: mpsc::UnboundedReceiver<RefusedPeer>,
}

impl Standby {
    async fn listen(material: &Arc<TlsMaterial>, allowed: &[&str]) -> Self {
        Self::with(material, allowed, LinkTimes::default(), 128).await
    }

    async fn with(
        material: &Arc<TlsMaterial>,
        allowed: &[&str],
        times: LinkTimes,
        handshakes_max: usize,
    ) -> Self {
        let (tell, refused) = mpsc::unbounded_channel();
        let options = ListenOptions {
            times,
            handshakes_max,
            on_refused: Arc::new(move |peer| drop(tell.send(peer))),
        };
        let allowed: BTreeSet<_> = allowed.iter().map(|name| site(name)).collect();
        let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
        let listener = TlsListener::bind(any, material.clone(), allowed, options, Env::system());
        Self {
            listener: listener.await.unwrap(),
            refused,
        }
    }

    fn address(&self) -> String {
        self.listener.address().to_string()
    }

    async fn refused(&mut self) -> RefusedPeer {
        soon(self.refused.recv()).await.unwrap()
    }
}

fn dialer(material: &Arc<TlsMaterial>, address: String, peer: &str) -> TlsDialer {
    let target = DialTarget {
        address,
        server_name: "127.0.0.1".to_owned(),
        site: site(peer),
    };
    TlsDialer::new(
        material.clone(),
        target,
        LinkTimes::default(),
        Env::system(),
    )
    .unwrap()
}

type Dialed = (TlsTx<ToStandby>, TlsRx<ToPrimary>);

/// Dials and says hello.
async fn greet(
    dialer: &TlsDialer,
    me: &TlsMaterial,
) -> Result<(Dialed, HelloReply), HandshakeError> {
    let (mut tx, mut rx) = soon(dialer.dial()).await?;
    let introduction = Introduction::new(me.site().clone());
    let certified = &dialer.target().site;
    let reply = as_primary(&mut tx, &mut rx, &introduction, certified, Timestamp(1));
    let reply = soon(reply).await?;
    Ok(((tx, rx), reply))
}

/// Accepts one link and answers its hello.
async fn answer(standby: &mut Standby, me: &TlsMaterial) -> Accepted {
    let mut link = soon(standby.listener.accept()).await;
    let introduction = Introduction::new(me.site().clone());
    let (tx, rx) = (&mut link.tx, &mut link.rx);
    let greeted = as_standby(tx, rx, &introduction, &link.peer.site, Timestamp(2));
    soon(greeted).await.unwrap();
    link
}
