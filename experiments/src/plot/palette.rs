//! A figure's pixels in 256 colours: text and lines have few, and a file of them is less than half as large.

use std::collections::HashMap;

/// Colours of a palette.
const COLOURS: usize = 256;

/// Bits of a channel by which colours are taken together.
const BITS: u32 = 5;

type Rgb = [u8; 3];

/// The palette and each pixel's place in it. Of colours that are nearly the same the most frequent stands for all, and of
/// those too rare for a place of their own (soft edges where bands lie over each other) the nearest.
pub(super) fn indexed(pixels: &[u8]) -> (Vec<Rgb>, Vec<u8>) {
    let mut counts: HashMap<Rgb, u32> = HashMap::new();
    let (pixels, _) = pixels.as_chunks::<3>();
    for pixel in pixels {
        *counts.entry(*pixel).or_default() += 1;
    }
    let palette = palette(&counts);
    let places: HashMap<Rgb, u8> =
        counts.keys().map(|colour| (*colour, nearest(&palette, *colour))).collect();
    let indices = pixels.iter().map(|pixel| places[pixel]).collect();
    (palette, indices)
}

fn palette(counts: &HashMap<Rgb, u32>) -> Vec<Rgb> {
    // By the colour taken together: how many pixels, and the most frequent with its count. Equal counts go by colour, so that
    // a figure is the same file each time.
    let mut groups: HashMap<Rgb, (u32, u32, Rgb)> = HashMap::new();
    for (&colour, &count) in counts {
        let group = groups.entry(colour.map(|channel| channel >> (8 - BITS))).or_insert((0, 0, colour));
        group.0 += count;
        if (count, colour) > (group.1, group.2) || group.1 == 0 {
            (group.1, group.2) = (count, colour);
        }
    }
    let mut groups: Vec<_> = groups.into_values().collect();
    groups.sort_unstable_by(|a, b| b.cmp(a));
    groups.truncate(COLOURS);
    groups.into_iter().map(|(_, _, colour)| colour).collect()
}

fn nearest(palette: &[Rgb], colour: Rgb) -> u8 {
    let distance = |other: &Rgb| -> u32 {
        other.iter().zip(colour).map(|(&a, b)| u32::from(a.abs_diff(b)).pow(2)).sum()
    };
    // 256 at most, so a place is a byte.
    (0..palette.len()).min_by_key(|&place| distance(&palette[place])).unwrap_or(0) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frequent_colours_are_kept_and_rare_ones_are_near() {
        let mut pixels = [255, 255, 255].repeat(5000);
        pixels.extend([0, 114, 178].repeat(900));
        // A thousand greys and blues, one pixel each.
        pixels.extend((0..1000u32).flat_map(|i| [(i / 4) as u8, (i / 5) as u8, (i % 256) as u8]));
        let (palette, indices) = indexed(&pixels);
        assert!(palette.len() <= COLOURS && indices.len() == 6900);
        let colour = |pixel: usize| palette[usize::from(indices[pixel])];
        assert_eq!((colour(0), colour(5000)), ([255, 255, 255], [0, 114, 178]));
        let error = |pixel: usize| -> u32 {
            let pixel_at = &pixels[3 * pixel..][..3];
            colour(pixel).iter().zip(pixel_at).map(|(&a, &b)| u32::from(a.abs_diff(b))).sum()
        };
        assert!((5900..6900).all(|pixel| error(pixel) < 90));
        assert_eq!(indexed(&pixels), (palette, indices), "the same each time");
    }
}
