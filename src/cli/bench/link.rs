//! A link between two sites on loopback: parts of frames through `transport`, with one stream and with
//! two, against the same bytes through plain TLS in the same process and on the same threads.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use tokio::runtime::Runtime;
use tokio::sync::mpsc;

use super::pages::{Numbers, fill};
use super::sample::Samples;
use super::{Bench, Row, Section, Unit};
use crate::clock::Env;
use crate::ids::SiteId;
use crate::pki::{self, Issue, Issued};
use crate::transport::{
    DialTarget, LinkTimes, ListenOptions, PlainTls, TlsDialer, TlsListener, TlsMaterial, TlsPaths,
    TlsTx,
};
use crate::wire::link::{Dialer, LinkRx, LinkTx};
use crate::wire::message::{ToPrimary, ToStandby};

const LOOPBACK: &str = "127.0.0.1";
const PART_BYTES: usize = 4 << 20;
const JOIN_MAX: Duration = Duration::from_secs(10);

/// Certificates of two sites.
struct Sites {
    near: (SiteId, Arc<TlsMaterial>),
    far: (SiteId, Arc<TlsMaterial>),
}

impl Sites {
    fn make(dir: &Path) -> anyhow::Result<Self> {
        let names = [LOOPBACK.to_owned()];
        let near: SiteId = "near".parse()?;
        let far: SiteId = "far".parse()?;
        let first = pki::authority::init(dir, &near, &names)?.first;
        let second = pki::authority::issue(
            dir,
            &Issue {
                site: &far,
                names: &names,
                out: &dir.join("far"),
                days: 1,
                overwrite: false,
            },
        )?;
        let load = |site: &SiteId, files: Issued| {
            let paths = TlsPaths {
                ca: files.ca,
                cert: files.cert,
                key: files.key,
                crl: None,
            };
            TlsMaterial::load(site, paths)
        };
        Ok(Self {
            near: (near.clone(), load(&near, first)?),
            far: (far.clone(), load(&far, second)?),
        })
    }
}

/// What the receiving task says after each sample: bytes so far.
type Arrived = mpsc::UnboundedReceiver<usize>;

/// A link that is up, and the standby's end of it, which only counts.
struct Linked {
    tx: TlsTx<ToStandby>,
    arrived: Arrived,
    _listener: TlsListener,
    _rx: crate::transport::TlsRx<ToPrimary>,
}

impl Linked {
    async fn connect(sites: &Sites, sample_bytes: usize, streams: usize) -> anyhow::Result<Self> {
        let allowed = BTreeSet::from([sites.near.0.clone()]);
        let address = (LOOPBACK.parse::<std::net::IpAddr>()?, 0).into();
        let options = ListenOptions::default();
        let material = sites.far.1.clone();
        let mut listener =
            TlsListener::bind(address, material, allowed, options, Env::system()).await?;
        let target = DialTarget {
            address: listener.address().to_string(),
            server_name: LOOPBACK.to_owned(),
            site: sites.far.0.clone(),
        };
        let material = sites.near.1.clone();
        let dialer = TlsDialer::new(material, target, LinkTimes::default(), Env::system());
        let dialer = dialer.map_err(anyhow::Error::msg)?.with_streams(streams);
        let (dialed, accepted) = tokio::join!(dialer.dial(), listener.accept());
        let (tx, rx) = dialed?;
        let (done, arrived) = mpsc::unbounded_channel();
        let mut far = accepted.rx;
        let mut answers = accepted.tx;
        // The other streams join when the peer is heard.
        let at = Env::system().now();
        answers.send(ToPrimary::Pong { nonce: 0, at }).await?;
        let joining = async {
            while tx.streams() < streams {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let joined = tokio::time::timeout(JOIN_MAX, joining).await;
        joined.context("the streams of a link did not come up")?;
        tokio::spawn(async move {
            let mut bytes = 0;
            while let Ok(message) = far.recv().await {
                if let ToStandby::Part(part) = message {
                    bytes += part.len();
                }
                if bytes >= sample_bytes {
                    bytes = 0;
                    // Nobody waits any more: the measurement is over.
                    let _ = done.send(sample_bytes);
                }
            }
            drop(answers);
        });
        Ok(Self {
            tx,
            arrived,
            _listener: listener,
            _rx: rx,
        })
    }

    async fn send(&mut self, parts: Vec<Vec<u8>>) -> anyhow::Result<f64> {
        let started = Instant::now();
        for part in parts {
            self.tx.send(ToStandby::Part(part.into())).await?;
        }
        self.arrived.recv().await.context("the far end is gone")?;
        Ok(started.elapsed().as_secs_f64())
    }
}

fn parts(count: usize) -> Vec<Vec<u8>> {
    let mut part = vec![0; PART_BYTES];
    fill(&mut part, &mut Numbers::new(5));
    vec![part; count]
}

fn rates(samples: Vec<f64>, section: Section, what: &str, bytes: usize) -> Row {
    Samples::new(samples).rates(section, what, Unit::Bytes, bytes as f64)
}

const PLAIN: &str = "plain TLS on loopback";

/// The limit alone.
pub(super) fn plain_alone(bench: &mut Bench) -> anyhow::Result<()> {
    let count = if bench.quick { 2 } else { 32 };
    let samples = bench.samples(15);
    let sites = Sites::make(&bench.dir.path().join("pki-limits"))?;
    let times = Runtime::new()?.block_on(async {
        let mut plain = PlainTls::connect(&sites.near.1, &sites.far.1, PART_BYTES).await?;
        let mut times = Vec::new();
        let parts = parts(count);
        for sample in 0..=samples {
            let started = Instant::now();
            plain.send(&parts).await?;
            if sample > 0 {
                times.push(started.elapsed().as_secs_f64());
            }
        }
        anyhow::Ok(times)
    })?;
    bench.push(rates(times, Section::Limits, PLAIN, count * PART_BYTES));
    Ok(())
}

pub(super) fn measure(bench: &mut Bench) -> anyhow::Result<()> {
    let count = if bench.quick { 2 } else { 32 };
    let samples = bench.samples(25);
    let sites = Sites::make(&bench.dir.path().join("pki"))?;
    let bytes = count * PART_BYTES;
    let (ones, twos, plains) = Runtime::new()?.block_on(async {
        let mut plain = PlainTls::connect(&sites.near.1, &sites.far.1, PART_BYTES).await?;
        let mut one = Linked::connect(&sites, bytes, 1).await?;
        let mut two = Linked::connect(&sites, bytes, 2).await?;
        let (mut ones, mut twos, mut plains) = (Vec::new(), Vec::new(), Vec::new());
        for sample in 0..=samples {
            let content = parts(count);
            let started = Instant::now();
            plain.send(&content).await?;
            let plain_took = started.elapsed().as_secs_f64();
            let one_took = one.send(content.clone()).await?;
            let two_took = two.send(content).await?;
            if sample > 0 {
                plains.push(plain_took);
                ones.push(one_took);
                twos.push(two_took);
            }
        }
        anyhow::Ok((ones, twos, plains))
    })?;
    let limit = rates(plains, Section::Stream, PLAIN, bytes);
    let one = "parts of 4 MiB over one link";
    let one = rates(ones, Section::Stream, one, bytes);
    let two = "the same over two streams of a link";
    let two = rates(twos, Section::Stream, two, bytes);
    bench.push(one.against(&limit).wanted_ratio(0.90));
    bench.push(two.against(&limit));
    Ok(())
}
