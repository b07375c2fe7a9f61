//! Random requests against a plain array.

use std::sync::Arc;

use super::client::{MemDisk, Random, Site};
use crate::nbd::protocol::*;

#[test]
fn random_requests_do_what_an_array_does() {
    const BYTES: usize = 300_001;
    for seed in 0..8 {
        let mut random = Random(seed);
        let disk = Arc::new(MemDisk::new("disk", BYTES));
        let site = Site::new(vec![disk.clone()]);
        let mut clients = [site.attached("disk"), site.attached("")];
        let mut model = vec![0u8; BYTES];
        let mut flushes = 0;
        for step in 0..300 {
            let client = &mut clients[random.below(2) as usize];
            let offset = random.below(BYTES as u64 + 1);
            let room = BYTES as u64 - offset;
            let length = random.below(room.min(100_000) + 1) as usize;
            let range = offset as usize..offset as usize + length;
            let fua = random.below(2) as u16;
            match random.below(5) {
                0 | 1 => {
                    let data: Vec<u8> = (0..length).map(|_| random.next() as u8).collect();
                    assert_eq!(client.write(fua, offset, &data), 0);
                    model[range].copy_from_slice(&data);
                    flushes += u64::from(fua);
                }
                2 => {
                    let command = [CMD_TRIM, CMD_WRITE_ZEROES][random.below(2) as usize];
                    assert_eq!(client.order(fua, command, offset, length as u32), 0);
                    model[range].fill(0);
                    flushes += u64::from(fua);
                }
                3 => {
                    assert_eq!(client.order(0, CMD_FLUSH, 0, 0), 0);
                    flushes += 1;
                }
                _ => {
                    let got = client.read(offset, length as u32).unwrap();
                    assert!(got == model[range], "seed {seed}, step {step}");
                }
            }
        }
        assert!(*disk.content.lock().unwrap() == model, "seed {seed}");
        assert_eq!(*disk.flushes.lock().unwrap(), flushes, "seed {seed}");
    }
}

#[test]
fn requests_may_be_sent_ahead() {
    let site = Site::new(vec![Arc::new(MemDisk::new("disk", 1 << 16))]);
    let mut client = site.attached("disk");
    for i in 0..100 {
        client.request(0, CMD_WRITE, i * 100, 3);
        client.send(&[i as u8; 3]);
        client.request(0, CMD_READ, i * 100, 3);
    }
    for i in 0..100 {
        assert_eq!(client.reply(), 0);
        assert_eq!(client.reply(), 0);
        assert_eq!(client.take(3), [i; 3]);
    }
}
