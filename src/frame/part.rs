//! Reads parts: judges the bytes, hands out rows, applies them to an image.

use std::io;
use std::sync::Arc;

use super::PART_BYTES_MAX;
use super::batch::{Batch, BatchKind, Decompressor, PLACE_ALIGN, Scale};
use super::delta::{self, DELTA_BYTES_MAX, DELTA_BYTES_MIN};
use super::error::FrameError;
use super::format::{
    FOOTER_BYTES, Footer, HEADER_BYTES, PartHeader, ROW_BYTES, TRAILER_BYTES, array_at,
    pack_trailer,
};
use super::manifest::Manifest;
use super::verified::{Decoded, Judged};
use crate::page::{Layout, PAGE_SIZE, PageAddr, REGION_PAGES_MAX, REGIONS_MAX, RegionId};

pub(super) const KIND_ZERO: u8 = 0;
pub(super) const KIND_RAW: u8 = 1;
pub(super) const KIND_DELTA: u8 = 2;

/// Most zero pages that the rows of one part may name together: two regions of the largest size.
pub(super) const ZERO_PAGES_MAX: u64 = 2 * REGION_PAGES_MAX as u64;

/// How a row's content is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RowKind {
    /// Zeros.
    Zero,
    /// The page as it is.
    Raw,
    /// Copy runs over the page before.
    Delta,
}

/// One row: a page, or a run of zero pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Row {
    /// The (first) page.
    pub addr: PageAddr,
    /// Number of pages; 1 unless the kind is zero.
    pub count: u32,
    /// How the content is stored.
    pub kind: RowKind,
    batch: u16,
    /// In bytes, a multiple of [`PLACE_ALIGN`].
    off: u32,
    len: u16,
}

/// Content of one row, decoded.
#[derive(Debug, Clone, Copy)]
pub enum Content<'a> {
    /// This many pages of zeros, from the row's address on.
    Zero(u32),
    /// The whole page.
    Raw(&'a [u8; PAGE_SIZE]),
    /// A copy-run delta, not yet judged.
    Delta(&'a [u8]),
}

/// Where a frame is applied to: RAM and disks of a guest, or a copy of them.
pub trait PageImage {
    /// The page, to change. An error stops the frame.
    fn page_mut(&mut self, addr: PageAddr) -> io::Result<&mut [u8; PAGE_SIZE]>;

    /// Writes zeros to `count` pages and reports each as [`touched`](Self::touched).
    fn zero(&mut self, addr: PageAddr, count: u32) -> io::Result<()> {
        for page in addr.page..addr.page + count {
            let addr = PageAddr { page, ..addr };
            self.page_mut(addr)?.fill(0);
            self.touched(addr);
        }
        Ok(())
    }

    /// False if pages of this region need not be written at all: they are skipped where that saves
    /// work.
    fn wants(&self, _region: RegionId) -> bool {
        true
    }

    /// The page has its new content. A page can be touched several times by one frame.
    fn touched(&mut self, _addr: PageAddr) {}

    /// Where several threads at once may put whole pages of this region. Each page is put at most
    /// once, and [`put`](Self::put) is called for it. `None`: they are written one by one.
    fn sink(&self, _region: RegionId) -> Option<Arc<dyn PageSink>> {
        None
    }

    /// A page of RAM was put into the [`sink`](Self::sink); this is the leaf of its content.
    fn put(&mut self, _addr: PageAddr, _leaf: [u8; 32]) {
        unreachable!("an image that offers a sink notes what is put there");
    }
}

/// See [`PageImage::sink`].
pub trait PageSink: Send + Sync {
    /// Puts pages that follow each other in one region, of which `addr` is the first.
    fn put(&self, addr: PageAddr, pages: &[[u8; PAGE_SIZE]]) -> io::Result<()>;
}

/// The bytes of one part, verified.
#[derive(Debug)]
pub struct PartView<'a> {
    bytes: &'a [u8],
    header: PartHeader,
    batches: Vec<Batch>,
    footer: Option<Footer>,
    hash: [u8; 32],
    /// Batches that somebody has decoded already.
    decoded: Option<&'a Decoded>,
}

impl<'a> PartView<'a> {
    /// Judges a part: header, size, blake3, trailer, padding, then the bounds of all batches and
    /// rows. One pass over the bytes; nothing is decoded. `bytes` is exactly the part.
    pub fn verify(bytes: &'a [u8]) -> Result<Self, FrameError> {
        let header = PartHeader::parse(bytes)?;
        header.check_size(bytes)?;
        let damaged = |why| FrameError::Damaged {
            epoch: header.epoch,
            part: header.part,
            why,
        };
        let (body, rest) = bytes.split_at(header.trailer_at() as usize);
        let (trailer, padding) = rest.split_at(TRAILER_BYTES);
        let hash = *blake3::hash(body).as_bytes();
        if trailer != pack_trailer(&header, &hash) {
            return Err(damaged("its hash or trailer is wrong"));
        }
        if padding.iter().any(|b| *b != 0) {
            return Err(damaged("its padding is not zero"));
        }
        let mut view = Self {
            bytes,
            batches: parse_batches(bytes, &header)?,
            footer: None,
            hash,
            header,
            decoded: None,
        };
        view.check_rows()?;
        view.footer = view.parse_footer()?;
        Ok(view)
    }

    pub(super) fn into_judged(self) -> Judged {
        Judged {
            header: self.header,
            batches: self.batches,
            footer: self.footer,
            hash: self.hash,
        }
    }

    /// `judged` was made of exactly these bytes.
    pub(super) fn of_judged(bytes: &'a [u8], judged: &Judged) -> Self {
        Self {
            bytes,
            header: judged.header.clone(),
            batches: judged.batches.clone(),
            footer: judged.footer,
            hash: judged.hash,
            decoded: None,
        }
    }

    /// `decoded` was made of this part.
    pub fn with_decoded(mut self, decoded: &'a Decoded) -> Self {
        self.decoded = Some(decoded);
        self
    }

    fn parse_footer(&self) -> Result<Option<Footer>, FrameError> {
        if !self.header.last {
            return Ok(None);
        }
        let wrong = |why| FrameError::Damaged {
            epoch: self.header.epoch,
            part: self.header.part,
            why,
        };
        let bytes: [u8; FOOTER_BYTES] = array_at(self.bytes, self.header.footer_at() as usize);
        let footer = Footer::parse(&bytes).ok_or(wrong("bytes that must be zero are not"))?;
        let parts = u64::from(footer.parts);
        let bytes_max = parts.saturating_mul(PART_BYTES_MAX as u64);
        if parts != u64::from(self.header.part) + 1 || footer.frame_bytes > bytes_max {
            return Err(wrong("its footer does not fit its header"));
        }
        Ok(Some(footer))
    }

    fn check_rows(&self) -> Result<(), FrameError> {
        let mut newest = [0u16; 2];
        let mut zero_pages = 0;
        for (number, bytes) in self.row_bytes().iter().enumerate() {
            let wrong = |why| FrameError::Row { row: number, why };
            let row = Row::parse(bytes, self.header.scale);
            let row = row.ok_or(wrong("its fields are impossible"))?;
            let end = u64::from(row.addr.page) + u64::from(row.count);
            if row.count == 0 || end > u64::from(REGION_PAGES_MAX) {
                return Err(wrong("its pages are outside any region"));
            }
            let kind = match row.kind {
                RowKind::Zero => {
                    zero_pages += u64::from(row.count);
                    if zero_pages > ZERO_PAGES_MAX {
                        return Err(wrong("it zeroes too many pages"));
                    }
                    continue;
                }
                RowKind::Raw => BatchKind::Raw,
                RowKind::Delta => BatchKind::Delta,
            };
            let batch = self
                .batches
                .get(usize::from(row.batch))
                .filter(|batch| batch.kind == kind)
                .ok_or(wrong("it has no batch"))?;
            if row.batch < newest[kind.index()] {
                if !self.header.references || kind != BatchKind::Raw {
                    return Err(wrong("its batch is out of order"));
                }
                let newest = &self.batches[usize::from(newest[kind.index()])];
                if usize::from(newest.nth - batch.nth) > self.header.scale.window() {
                    return Err(wrong("it refers too far back"));
                }
            } else {
                newest[kind.index()] = row.batch;
            }
            if row.off + u32::from(row.len) > batch.raw_len {
                return Err(wrong("its content is outside its batch"));
            }
        }
        Ok(())
    }

    fn row_bytes(&self) -> &'a [[u8; ROW_BYTES]] {
        let range = self.header.rows_at() as usize..self.header.manifest_at() as usize;
        self.bytes[range].as_chunks().0
    }

    /// The header.
    pub fn header(&self) -> &PartHeader {
        &self.header
    }

    /// The footer; `None` if this is not the last part.
    pub fn footer(&self) -> Option<&Footer> {
        self.footer.as_ref()
    }

    /// The manifest, decoded. An error if this is not the last part.
    pub fn manifest(&self) -> Result<Manifest, FrameError> {
        if !self.header.last {
            return Err(FrameError::Incomplete("only the last part has a manifest"));
        }
        let range = self.header.manifest_at() as usize..self.header.footer_at() as usize;
        Manifest::load(
            self.header.manifest_codec,
            self.header.manifest_raw_len,
            &self.bytes[range],
        )
    }

    /// blake3 of the part up to its trailer.
    pub fn hash(&self) -> [u8; 32] {
        self.hash
    }

    /// What [`rows_hash`] says of this part.
    pub fn rows_hash(&self) -> [u8; 32] {
        rows_hash(&self.header, self.row_bytes().as_flattened())
    }

    /// The batches, in order.
    pub fn batches(&self) -> &[Batch] {
        &self.batches
    }

    /// The part's bytes.
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// The rows, in the order in which they apply.
    pub fn rows(&self) -> impl Iterator<Item = Row> + 'a {
        let rows = rows_in(self.header.scale, self.row_bytes().as_flattened());
        rows.map(|row| row.expect("rows are checked by verify"))
    }

    /// An error if a row names a page outside `layout`.
    pub fn check_layout(&self, layout: &Layout) -> Result<(), FrameError> {
        self.rows().try_for_each(|row| row.check_layout(layout))
    }

    /// Decodes the part: calls `each` with every row's content, in order. Every batch is decoded
    /// once, into one of two buffers, or of so many more as rows may refer back.
    pub fn for_each<E: From<FrameError>>(
        &self,
        each: impl FnMut(PageAddr, Content<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        self.for_each_of(|_| true, each)
    }

    /// The same for rows of the regions that `wants` names.
    pub fn for_each_of<E: From<FrameError>>(
        &self,
        wants: impl Fn(RegionId) -> bool,
        each: impl FnMut(PageAddr, Content<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut decoder = Decompressor::default();
        self.for_each_from(
            wants,
            |batch, out| self.decode(batch, &mut decoder, out),
            each,
        )
    }

    /// The same, with batches that `decode` puts into a buffer: each once, in the order in which rows
    /// refer to them first.
    fn for_each_from<E: From<FrameError>>(
        &self,
        wants: impl Fn(RegionId) -> bool,
        mut decode: impl FnMut(u16, &mut Vec<u8>) -> Result<(), FrameError>,
        mut each: impl FnMut(PageAddr, Content<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        // Of each kind the newest batches, each in a place of its own: a row that is due refers to none
        // that another one has replaced.
        let back = match self.header.references {
            true => self.header.scale.window(),
            false => 0,
        };
        let mut open = [vec![(None, Vec::new()); back + 1], vec![(None, Vec::new())]];
        for row in self.rows().filter(|row| wants(row.addr.region)) {
            let kind = match row.kind {
                RowKind::Zero => {
                    each(row.addr, Content::Zero(row.count))?;
                    continue;
                }
                RowKind::Raw => BatchKind::Raw,
                RowKind::Delta => BatchKind::Delta,
            };
            let ahead = self.decoded.and_then(|decoded| decoded.batch(row.batch));
            let open = &mut open[kind.index()];
            let place = usize::from(self.batches[usize::from(row.batch)].nth) % open.len();
            let (number, decoded) = &mut open[place];
            if ahead.is_none() && *number != Some(row.batch) {
                decode(row.batch, decoded)?;
                *number = Some(row.batch);
            }
            let content = ahead.unwrap_or(decoded);
            let bytes = &content[row.off as usize..][..usize::from(row.len)];
            match kind {
                BatchKind::Raw => {
                    let page = bytes.try_into().expect("a raw row has the size of a page");
                    each(row.addr, Content::Raw(page))?;
                }
                BatchKind::Delta => each(row.addr, Content::Delta(bytes))?,
            }
        }
        Ok(())
    }

    fn decode(
        &self,
        number: u16,
        decoder: &mut Decompressor,
        out: &mut Vec<u8>,
    ) -> Result<(), FrameError> {
        #[cfg(test)]
        DECODED.set(DECODED.get() + 1);
        decode_batch(self.bytes, &self.batches, number, decoder, out)
    }

    /// Applies the rows to an image, in order. The caller has checked the layout. On an error the
    /// image holds a part of the changes; applying the frame again, whole, makes it right.
    pub fn apply(&self, image: &mut dyn PageImage) -> Result<(), FrameError> {
        // Asked before, because the image is borrowed while rows are applied.
        let regions: Vec<bool> = (0..REGIONS_MAX as u16)
            .map(|region| image.wants(RegionId(region)))
            .collect();
        self.for_each_of(
            |region| regions.get(usize::from(region.0)).copied().unwrap_or(true),
            |addr, content| apply_content(image, addr, content),
        )
    }

    /// The same for all rows, whatever the image wants, with batches that `decode` puts into a buffer: those of
    /// [`batches_wanted`](Self::batches_wanted), in that order.
    pub(super) fn apply_from(
        &self,
        image: &mut dyn PageImage,
        decode: impl FnMut(u16, &mut Vec<u8>) -> Result<(), FrameError>,
    ) -> Result<(), FrameError> {
        let each = |addr, content: Content<'_>| apply_content(image, addr, content);
        self.for_each_from(|_| true, decode, each)
    }

    /// The batches, in the order in which rows refer to them first.
    pub(super) fn batches_wanted(&self) -> Vec<u16> {
        let mut seen = vec![false; self.batches.len()];
        let rows = self.rows().filter(|row| row.kind != RowKind::Zero);
        rows.map(|row| row.batch)
            .filter(|batch| !std::mem::replace(&mut seen[usize::from(*batch)], true))
            .collect()
    }
}

/// Decodes the batch with this number of a part with these bytes and batches into `out`, which holds nothing
/// else then.
pub(super) fn decode_batch(
    part: &[u8],
    batches: &[Batch],
    number: u16,
    decoder: &mut Decompressor,
    out: &mut Vec<u8>,
) -> Result<(), FrameError> {
    let batch = &batches[usize::from(number)];
    let decoded = batch.decode(decoder, &part[batch.range()], out);
    decoded.map_err(|why| FrameError::Batch {
        batch: usize::from(number),
        why,
    })
}

/// blake3 over the number of batches (u32) and the rows of a part: where the content of its pages lies.
/// Whoever kept it of a part that was verified knows rows again that were read alone.
pub fn rows_hash(header: &PartHeader, rows: &[u8]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&header.batches.to_le_bytes());
    hasher.update(rows);
    *hasher.finalize().as_bytes()
}

/// The rows that these bytes are, of a part with batches of this scale, in order; `None` for impossible
/// ones. A part that was verified has none of these.
pub fn rows_in(scale: Scale, bytes: &[u8]) -> impl Iterator<Item = Option<Row>> {
    let rows = bytes.as_chunks().0.iter();
    rows.map(move |row| Row::parse(row, scale))
}

#[cfg(test)]
thread_local! {
    static DECODED: std::cell::Cell<u64> = const { std::cell::Cell::new(0) };
}

/// Batches that this thread has decoded for rows so far.
#[cfg(test)]
pub(super) fn decoded_batches() -> u64 {
    DECODED.get()
}

fn apply_content(
    image: &mut dyn PageImage,
    addr: PageAddr,
    content: Content<'_>,
) -> Result<(), FrameError> {
    match content {
        Content::Zero(count) => return Ok(image.zero(addr, count)?),
        Content::Raw(page) => *image.page_mut(addr)? = *page,
        Content::Delta(delta) => delta::apply(delta, image.page_mut(addr)?)
            .map_err(|why| FrameError::Delta { addr, why })?,
    }
    image.touched(addr);
    Ok(())
}

fn parse_batches(bytes: &[u8], header: &PartHeader) -> Result<Vec<Batch>, FrameError> {
    let end = header.rows_at() as usize;
    let mut at = HEADER_BYTES;
    let mut counts = [0; 2];
    // The header's check has bounded the number.
    let mut batches = Vec::with_capacity(header.batches as usize);
    for number in 0..header.batches as usize {
        let mut batch = Batch::parse(bytes, at, end, number, header.scale)?;
        batch.nth = counts[batch.kind.index()];
        counts[batch.kind.index()] += 1;
        at = batch.at as usize + batch.len as usize;
        batches.push(batch);
    }
    if at != end {
        return Err(FrameError::Header(
            "the batches do not add up to their size",
        ));
    }
    Ok(batches)
}

impl Row {
    /// Where its content lies: number of the batch, position and length within its decoded bytes. Of
    /// no meaning for zeros.
    pub fn place(&self) -> (u16, u32, u16) {
        (self.batch, self.off, self.len)
    }

    /// An error if it names a page outside `layout`.
    pub fn check_layout(&self, layout: &Layout) -> Result<(), FrameError> {
        let end = u64::from(self.addr.page) + u64::from(self.count);
        match layout.get(self.addr.region) {
            Some(region) if end <= u64::from(region.pages) => Ok(()),
            _ => Err(FrameError::OutsideLayout {
                addr: self.addr,
                count: self.count,
            }),
        }
    }

    /// Reads a row; `None` if its fields are impossible whatever the part holds.
    fn parse(bytes: &[u8; ROW_BYTES], scale: Scale) -> Option<Self> {
        let short = |at: usize| u16::from_le_bytes(array_at(bytes, at));
        let (batch, off, len) = (short(8), u32::from(short(10)) * scale.unit(), short(12));
        let placed = bytes[2] == KIND_ZERO || off.is_multiple_of(PLACE_ALIGN);
        let (kind, count) = match bytes[2] {
            KIND_ZERO if len == 0 => (RowKind::Zero, u32::from_le_bytes(array_at(bytes, 8))),
            KIND_RAW if usize::from(len) == PAGE_SIZE => (RowKind::Raw, 1),
            KIND_DELTA if (DELTA_BYTES_MIN..=DELTA_BYTES_MAX).contains(&usize::from(len)) => {
                (RowKind::Delta, 1)
            }
            _ => return None,
        };
        (bytes[3] == 0 && short(14) == 0 && placed).then(|| Self {
            addr: PageAddr {
                region: RegionId(short(0)),
                page: u32::from_le_bytes(array_at(bytes, 4)),
            },
            count,
            kind,
            batch,
            off,
            len,
        })
    }
}
