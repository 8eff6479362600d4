// RUN: furiosa-llm opt %s --split-input-file | filecheck %s

// A parameter is declared once and read by its name in the checkpoint.
nn.parameter @model.layers.0.mlp.up_proj.weight : tensor<96x64xbf16>
func.func @parameter(%x: tensor<2x64xbf16>) -> tensor<2x96xbf16> {
  %w = nn.get_parameter @model.layers.0.mlp.up_proj.weight : tensor<96x64xbf16>
  %y = nn.linear %x, %w : tensor<2x64xbf16>, tensor<96x64xbf16> -> tensor<2x96xbf16>
  func.return %y : tensor<2x96xbf16>
}
// CHECK: nn.parameter @model.layers.0.mlp.up_proj.weight : tensor<96x64xbf16>
// CHECK: %w = nn.get_parameter @model.layers.0.mlp.up_proj.weight : tensor<96x64xbf16>
// CHECK-NEXT: nn.linear %x, %w : tensor<2x64xbf16>, tensor<96x64xbf16> -> tensor<2x96xbf16>

// -----

// Names that are no bare identifiers are quoted.
nn.parameter @"block-0/weight" : tensor<4xbf16>
// CHECK: nn.parameter @"block-0/weight" : tensor<4xbf16>

// -----

// Small constants are readable; where decimals would lose bits, hexadecimal stands in.
func.func @constants() {
  %0 = nn.constant dense<[1.0, 0.5]> : tensor<2xf32>
  %1 = nn.constant dense<7> : tensor<2x2xi32>
  %2 = nn.constant dense<"0x0000000000000080"> : tensor<2xf32>
  func.return
}
// CHECK:      nn.constant dense<[1.000000e+00, 5.000000e-01]> : tensor<2xf32>
// CHECK-NEXT: nn.constant dense<7> : tensor<2x2xi32>
// CHECK-NEXT: nn.constant dense<"0x0000000000000080"> : tensor<2xf32>

// -----

// The layers of a decoder block.
func.func @block(%x: tensor<2x3x64xbf16>, %positions: tensor<2x3xi32>, %norm: tensor<64xbf16>, %w: tensor<64x64xbf16>, %q: tensor<2x4x3x16xbf16>, %k: tensor<2x2x3x16xbf16>) {
  %n = nn.rms_norm %x, %norm eps 1.0e-05 : tensor<2x3x64xbf16>, tensor<64xbf16> -> tensor<2x3x64xbf16>
  %l = nn.linear %n, %w bias %norm : tensor<2x3x64xbf16>, tensor<64x64xbf16> bias tensor<64xbf16> -> tensor<2x3x64xbf16>
  %r = nn.rope %q, %positions scaling 1.0 inv_freq [1.0, 0.1, 0.01] : tensor<2x4x3x16xbf16>, tensor<2x3xi32> -> tensor<2x4x3x16xbf16>
  %a = nn.attention %r, %k, %k scale 0.25 causal window 2 layer 0 : tensor<2x4x3x16xbf16>, tensor<2x2x3x16xbf16>, tensor<2x2x3x16xbf16> -> tensor<2x3x4x16xbf16>
  %b = nn.attention %r, %k, %k scale 0.25 : tensor<2x4x3x16xbf16>, tensor<2x2x3x16xbf16>, tensor<2x2x3x16xbf16> -> tensor<2x3x4x16xbf16>
  %e = nn.embedding %positions, %w : tensor<2x3xi32>, tensor<64x64xbf16> -> tensor<2x3x64xbf16>
  %m = nn.matmul %x, %w : tensor<2x3x64xbf16>, tensor<64x64xbf16> -> tensor<2x3x64xbf16>
  func.return
}
// CHECK:      nn.rms_norm %x, %norm eps 1.0e-05 : {{.*}} -> tensor<2x3x64xbf16>
// CHECK-NEXT: nn.linear %n, %w bias %norm : {{.*}} bias tensor<64xbf16> -> tensor<2x3x64xbf16>
// CHECK-NEXT: nn.rope %q, %positions scaling 1.0 inv_freq [1.0, 0.1, 0.01] : {{.*}} -> tensor<2x4x3x16xbf16>
// CHECK-NEXT: nn.attention %r, %k, %k scale 0.25 causal window 2 layer 0 : {{.*}} -> tensor<2x3x4x16xbf16>
// CHECK-NEXT: nn.attention %r, %k, %k scale 0.25 : {{.*}} -> tensor<2x3x4x16xbf16>
// CHECK-NEXT: nn.embedding %positions, %w : {{.*}} -> tensor<2x3x64xbf16>
// CHECK-NEXT: nn.matmul %x, %w : {{.*}} -> tensor<2x3x64xbf16>
