// RUN: not furiosa-llm opt %s --split-input-file 2>&1 | filecheck %s

// K and V of a token lie in one run: the third dimension of a cache is 2.
func.func @no_values(%cache: tensor<64x2x1x16xbf16>, %k: tensor<1x2x3x16xbf16>, %slots: tensor<1x3xi32>) {
  %0 = paged.write %cache, %k, %k, %slots : tensor<64x2x1x16xbf16>, tensor<1x2x3x16xbf16>, tensor<1x2x3x16xbf16>, tensor<1x3xi32> -> tensor<64x2x1x16xbf16>
  func.return
}
// CHECK:      at: paged.write in @no_values
// CHECK-NEXT: cause: cache must be [64, 2, 2, 16], but it is [64, 2, 1, 16]

// -----

// A slot for each key of the table would be [batch, attn]: slot_mapping goes with the tokens.
func.func @slots(%cache: tensor<64x2x2x16xbf16>, %k: tensor<1x2x3x16xbf16>, %slots: tensor<1x8xi32>) {
  %0 = paged.write %cache, %k, %k, %slots : tensor<64x2x2x16xbf16>, tensor<1x2x3x16xbf16>, tensor<1x2x3x16xbf16>, tensor<1x8xi32> -> tensor<64x2x2x16xbf16>
  func.return
}
// CHECK: cause: slot_mapping must be [1, 3], but it is [1, 8]
