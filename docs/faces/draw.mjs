// Draws pixel faces, 16 x 16, by DiceBear's "Pixel Art" and says what is in each of them.
//
//   node draw.mjs COUNT FOLDER
//
// writes FOLDER/pixels.rgb (COUNT x 16 x 16 x 3 bytes) and FOLDER/parts.csv. Face i has the seed
// "face-i"; a face whose pixels were drawn before is left out, so no image can be in two splits.
import { createHash } from 'node:crypto';
import { writeFileSync } from 'node:fs';
import { createAvatar } from '@dicebear/core';
import * as pixelArt from '@dicebear/pixel-art';
import { Resvg } from '@resvg/resvg-js';

const SIDE = 16; // the design's own grid: one pixel of it is one pixel here
const OPTIONS = {
  glassesProbability: 30, // per cent
  hatProbability: 30,
  beardProbability: 20,
  accessoriesProbability: 10,
  backgroundColor: ['b6e3f4', 'c0aede', 'd1d4f9', 'ffd5dc', 'ffdfbf'],
  backgroundType: ['solid'],
};

const count = Number(process.argv[2]);
const folder = process.argv[3];
if (!Number.isInteger(count) || count < 1 || !folder) {
  console.error('usage: node draw.mjs COUNT FOLDER');
  process.exit(2);
}

const pixels = Buffer.alloc(count * SIDE * SIDE * 3);
const rows = ['seed,glasses,hat,hair_color,background_color,clothing_color'];
const seen = new Set();
for (let seed = 0, drawn = 0; drawn < count; seed++) {
  const avatar = createAvatar(pixelArt, { seed: `face-${seed}`, ...OPTIONS });
  const picture = new Resvg(avatar.toString(), { fitTo: { mode: 'width', value: SIDE } }).render();
  const rgb = Buffer.alloc(SIDE * SIDE * 3);
  for (let i = 0; i < SIDE * SIDE; i++) picture.pixels.copy(rgb, 3 * i, 4 * i, 4 * i + 3);
  const hash = createHash('sha256').update(rgb).digest('base64');
  if (seen.has(hash)) continue;
  seen.add(hash);
  rgb.copy(pixels, drawn * rgb.length);
  const parts = avatar.toJson().extra;
  const colors = [parts.hairColor, parts.primaryBackgroundColor, parts.clothingColor];
  rows.push([seed, parts.glasses ? 1 : 0, parts.hat ? 1 : 0, ...colors.map((c) => c.slice(1))].join());
  drawn++;
  if (drawn % 1000 === 0 || drawn === count) process.stderr.write(`\r${drawn} of ${count} faces`);
}
process.stderr.write('\n');
writeFileSync(`${folder}/pixels.rgb`, pixels);
writeFileSync(`${folder}/parts.csv`, rows.join('\n') + '\n');
