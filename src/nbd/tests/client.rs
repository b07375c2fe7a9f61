//! A client that says exactly what a test wants, and exports to talk to.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::nbd::protocol::*;
use crate::nbd::{Export, NbdServer};

/// A disk in memory.
pub struct MemDisk {
    pub name: &'static str,
    pub read_only: bool,
    pub min: u32,
    pub content: Mutex<Vec<u8>>,
    pub flushes: Mutex<u64>,
}

impl MemDisk {
    pub fn new(name: &'static str, bytes: usize) -> Self {
        Self {
            name,
            read_only: false,
            min: 1,
            content: Mutex::new(vec![0; bytes]),
            flushes: Mutex::new(0),
        }
    }
}

impl Export for MemDisk {
    fn name(&self) -> &str {
        self.name
    }

    fn bytes(&self) -> u64 {
        self.content.lock().unwrap().len() as u64
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn block_min(&self) -> u32 {
        self.min
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        into.copy_from_slice(&self.content.lock().unwrap()[offset as usize..][..into.len()]);
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        assert!(!self.read_only);
        self.content.lock().unwrap()[offset as usize..][..data.len()].copy_from_slice(data);
        Ok(())
    }

    fn zero(&self, offset: u64, bytes: u64) -> io::Result<()> {
        assert!(!self.read_only);
        self.content.lock().unwrap()[offset as usize..][..bytes as usize].fill(0);
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        *self.flushes.lock().unwrap() += 1;
        Ok(())
    }
}

/// A server in a runtime of its own, so that a test may block.
pub struct Site {
    pub server: Option<NbdServer>,
    pub dir: tempfile::TempDir,
    _runtime: tokio::runtime::Runtime,
}

impl Site {
    pub fn new(exports: Vec<Arc<dyn Export>>) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let dir = tempfile::tempdir().unwrap();
        let entered = runtime.enter();
        let server = NbdServer::bind(&dir.path().join("nbd.sock"), exports).unwrap();
        drop(entered);
        Self {
            server: Some(server),
            dir,
            _runtime: runtime,
        }
    }

    pub fn socket(&self) -> &Path {
        self.server.as_ref().unwrap().path()
    }

    /// A client behind the greeting.
    pub fn client(&self) -> Client {
        let stream = UnixStream::connect(self.socket()).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(60)))
            .unwrap();
        let mut client = Client { stream };
        assert_eq!(client.u64(), NBDMAGIC);
        assert_eq!(client.u64(), IHAVEOPT);
        assert_eq!(client.u16(), FIXED_NEWSTYLE | NO_ZEROES);
        client
    }

    /// A client that has chosen an export.
    pub fn attached(&self, name: &str) -> Client {
        let mut client = self.client();
        client.send(&3u32.to_be_bytes());
        client.option(OPT_GO, &info(name, &[]));
        while client.answer().0 != REP_ACK {}
        client
    }
}

/// Data of `INFO` and `GO`.
pub fn info(name: &str, wishes: &[u16]) -> Vec<u8> {
    let mut data = (name.len() as u32).to_be_bytes().to_vec();
    data.extend(name.as_bytes());
    data.extend((wishes.len() as u16).to_be_bytes());
    wishes.iter().for_each(|w| data.extend(w.to_be_bytes()));
    data
}

pub struct Client {
    pub stream: UnixStream,
}

impl Client {
    pub fn send(&mut self, bytes: &[u8]) {
        // The server may have hung up already; what it said before is what counts.
        let _ = self.stream.write_all(bytes);
    }

    pub fn option(&mut self, option: u32, data: &[u8]) {
        self.send(&IHAVEOPT.to_be_bytes());
        self.send(&option.to_be_bytes());
        self.send(&(data.len() as u32).to_be_bytes());
        self.send(data);
    }

    /// Kind and data of the answer to an option.
    pub fn answer(&mut self) -> (u32, Vec<u8>) {
        assert_eq!(self.u64(), OPT_REPLY);
        let _option = self.u32();
        let kind = self.u32();
        let length = self.u32();
        (kind, self.take(length as usize))
    }

    pub fn request(&mut self, flags: u16, command: u16, offset: u64, length: u32) {
        let mut bytes = REQUEST.to_be_bytes().to_vec();
        bytes.extend(flags.to_be_bytes());
        bytes.extend(command.to_be_bytes());
        bytes.extend(0x0123_4567_89ab_cdefu64.to_be_bytes());
        bytes.extend(offset.to_be_bytes());
        bytes.extend(length.to_be_bytes());
        self.send(&bytes);
    }

    /// Error number of the next reply.
    pub fn reply(&mut self) -> u32 {
        assert_eq!(self.u32(), REPLY);
        let error = self.u32();
        assert_eq!(self.u64(), 0x0123_4567_89ab_cdef);
        error
    }

    pub fn read(&mut self, offset: u64, length: u32) -> Result<Vec<u8>, u32> {
        self.request(0, CMD_READ, offset, length);
        match self.reply() {
            0 => Ok(self.take(length as usize)),
            error => Err(error),
        }
    }

    pub fn write(&mut self, flags: u16, offset: u64, data: &[u8]) -> u32 {
        self.request(flags, CMD_WRITE, offset, data.len() as u32);
        self.send(data);
        self.reply()
    }

    pub fn order(&mut self, flags: u16, command: u16, offset: u64, length: u32) -> u32 {
        self.request(flags, command, offset, length);
        self.reply()
    }

    /// The server hangs up without another word.
    pub fn assert_closed(&mut self) {
        let mut rest = Vec::new();
        match self.stream.read_to_end(&mut rest) {
            Ok(_) => assert!(rest.is_empty(), "{} bytes more", rest.len()),
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::ConnectionReset),
        }
    }

    pub fn take(&mut self, bytes: usize) -> Vec<u8> {
        let mut buffer = vec![0; bytes];
        self.stream.read_exact(&mut buffer).unwrap();
        buffer
    }

    pub fn u16(&mut self) -> u16 {
        u16::from_be_bytes(self.take(2).try_into().unwrap())
    }

    pub fn u32(&mut self) -> u32 {
        u32::from_be_bytes(self.take(4).try_into().unwrap())
    }

    pub fn u64(&mut self) -> u64 {
        u64::from_be_bytes(self.take(8).try_into().unwrap())
    }
}

/// SplitMix64.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Below `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}
